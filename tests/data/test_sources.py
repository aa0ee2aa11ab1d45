import bz2
import csv
import gzip
import json
import lzma
import re
import sys
import time
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightprune.data import Source
from lightprune.data.builtin import BUILTIN, PYTHON_SOURCE_BYTES
from lightprune.data.documents import DocumentStream
from lightprune.data.readers import _split
from lightprune.errors import ConfigError


def read(source: Source) -> list[str]:
    source.check("d")
    source.identity("d")
    return list(source.documents("d"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("beta\n\n\n\nbeth\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("alpha über", encoding="utf-8")
    (tmp_path / "sub" / "c.txt").write_text("gamma", encoding="utf-8")
    return tmp_path


def test_text_files_are_one_document_each(texts: Path) -> None:
    whole = "beta\n\n\n\nbeth\n"
    assert read(Source(files=str(texts / "b.txt"))) == [whole]
    assert read(Source(files=str(texts / "*.txt"))) == ["alpha über", whole]
    assert read(Source(files=str(texts / "**/*.txt"))) == ["alpha über", whole, "gamma"]


def test_a_list_keeps_its_order_and_names_no_file_twice(texts: Path) -> None:
    files = [str(texts / "sub/c.txt"), str(texts / "*.txt"), str(texts / "a.txt")]
    assert read(Source(files=files)) == ["gamma", "alpha über", "beta\n\n\n\nbeth\n"]


def test_separator_cuts_a_file_into_documents(texts: Path) -> None:
    found = read(Source(files=str(texts / "b.txt"), separator="\n\n"))
    assert [text.strip() for text in found if text.strip()] == ["beta", "beth"]


def test_a_separator_may_lie_across_the_chunks_that_are_read(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = "one<>two<><>three<"
    (texts / "d.txt").write_text(whole)
    for size in range(1, 8):
        monkeypatch.setattr("lightprune.data.readers._CHUNK", size)
        assert read(Source(files=str(texts / "d.txt"), separator="<>")) == whole.split("<>")


def test_a_long_text_without_its_separator_is_looked_at_once(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk by chunk from the beginning, this would copy 64 GB of characters."""
    monkeypatch.setattr("lightprune.data.readers._CHUNK", 32)
    whole = "x" * 2**21
    (texts / "d.txt").write_text(whole)
    began = time.monotonic()
    assert read(Source(files=str(texts / "d.txt"), separator="<>")) == [whole]
    assert time.monotonic() - began < 5


@given(text=st.text("ab<>", max_size=40), separator=st.text("a<>", min_size=1, max_size=4), size=st.integers(1, 7))
def test_documents_are_cut_as_if_the_text_were_one_string(text: str, separator: str, size: int) -> None:
    chunks = [text[i : i + size] for i in range(0, len(text), size)]
    assert list(_split(chunks, separator)) == text.split(separator)


@pytest.mark.parametrize("separator", ["\n\n", "\r\n\r\n"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_separator_of_blank_lines_whatever_the_line_ends(tmp_path: Path, line_end: str, separator: str) -> None:
    (tmp_path / "x.txt").write_bytes(line_end.join(["one", "more", "", "two", "", "three"]).encode())
    assert read(Source(files=str(tmp_path / "x.txt"), separator=separator)) == ["one\nmore", "two", "three"]


BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.txt", b"one|two"),
        ("x.jsonl", b'{"text": "one"}\r\n{"text": "two"}\r\n'),
        ("x.csv", b'id,text\r\n1,one\r\n2,"two"\r\n'),
        ("x.tsv", b"text\tid\none\t1\ntwo\t2\n"),
        ("X.JSONL", b'{"text": "one"}\n{"text": "two"}\n'),
        ("X.CSV", b"text\none\ntwo\n"),
    ],
)
@pytest.mark.parametrize("mark", [b"", BYTE_ORDER_MARK], ids=["", "marked"])
@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_file(
    tmp_path: Path, name: str, content: bytes, mark: bytes, suffix: str, streaming: bool
) -> None:
    compress = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix]
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(compress(mark + content))
    source = Source(files=path, separator="|", streaming=streaming)  # type: ignore[arg-type]
    source.check("d")
    assert list(DocumentStream(source, "d")) == read(source) == ["one", "two"]


def test_a_table_is_read_as_it_is_written(tmp_path: Path) -> None:
    """Line breaks and commas in quotes; what looks like numbers or missing; a guess from the first rows that fails."""
    rows = [["1", "7"], ["NA", "8"], ['a "b",\nc', "x"], ["", "9"], ["long" * 400_000, "1"]]
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["body", "n"], *([text, number] for text, number in rows)])
    assert read(Source(files=str(tmp_path / "x.csv"), text="body")) == [text for text, _ in rows]


def test_a_table_that_an_earlier_release_has_cached_as_prose_is_read_anew(tmp_path: Path) -> None:
    for name in ("x.csv", "x.tsv", "x.JSONL", "x.txt", "x.jsonl"):
        path = tmp_path / name
        path.write_text("text\n")
        stat = path.stat()
        earlier = [str(path), stat.st_size, stat.st_mtime_ns]
        stays = name in ("x.txt", "x.jsonl")
        assert (Source(files=str(path)).identity("d")["files"] == [earlier]) == stays


@pytest.mark.parametrize("streaming", [False, True])
def test_a_local_directory_given_as_hub_is_known_by_its_files(tmp_path: Path, streaming: bool) -> None:
    folder = tmp_path / "local"
    folder.mkdir()
    source = Source(hub=folder, streaming=streaming)  # type: ignore[arg-type]
    before = None
    for text in ("one", "two and more"):
        (folder / "train.jsonl").write_text(json.dumps({"text": text}))
        assert source.identity("d") != before
        before = source.identity("d")
        assert list(DocumentStream(source, "d")) == [text]
    assert source.identity("d") == before


def test_paths_are_as_good_as_strings(texts: Path) -> None:
    assert Source(files=texts / "a.txt") == Source(files=str(texts / "a.txt"))  # type: ignore[arg-type]
    assert Source(files=(texts / "a.txt", "b")).files == [str(texts / "a.txt"), "b"]  # type: ignore[arg-type]
    assert Source(saved=texts).saved == str(texts)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    rows = [{"body": "one"}, {"body": "two\nlines", "more": 3}, {"body": None}]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert read(Source(files=str(path), text="body")) == ["one", "two\nlines", ""]


def test_half_of_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    """JSON can hold what no tokenizer takes."""
    (tmp_path / "rows.jsonl").write_text(r'{"text": "so \ud800 \ud83d\ude00"}')
    assert read(Source(files=str(tmp_path / "rows.jsonl"))) == ["so ? 😀"]


def test_parquet_and_saved_directories(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(600)]
    table = datasets.Dataset.from_dict({"body": texts, "n": list(range(600))})
    table.to_parquet(str(tmp_path / "rows.parquet"))
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "dev": table.select([7])}).save_to_disk(str(tmp_path / "many"))
    assert read(Source(files=str(tmp_path / "rows.parquet"), text="body")) == texts
    assert read(Source(saved=str(tmp_path / "one"), text="body")) == texts
    assert read(Source(saved=str(tmp_path / "many"), text="body")) == texts
    assert read(Source(saved=str(tmp_path / "many"), text="body", split="dev")) == ["document 7"]


def test_package_resources(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = texts / "carrier_of_text"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('found, but never imported')")
    (package / "data" / "x.txt").write_text("inside")
    monkeypatch.syspath_prepend(str(texts))
    assert read(Source(files="pkg://carrier_of_text/data/x.txt")) == ["inside"]
    assert read(Source(files="pkg://carrier_of_text/data/*")) == ["inside"]
    assert "carrier_of_text" not in sys.modules


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("no_network")
def test_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: object, **kwargs: object) -> datasets.Dataset:
        asked.append((args, kwargs))
        return datasets.Dataset.from_dict({"body": ["x", "y"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source(hub="org/name", subset="small", split="train[:10%]", revision="v1", text="body")
    assert read(source) == ["x", "y"]
    assert asked == [(("org/name", "small"), {"split": "train[:10%]", "revision": "v1"})]


def test_identity_follows_the_text_but_not_its_use(texts: Path) -> None:
    path = texts / "a.txt"
    before = Source(files=str(path)).identity("d")
    assert Source(files=str(path), max_blocks=3).identity("other") == before
    path.write_text("something else")
    assert Source(files=str(path)).identity("d") != before
    assert Source(files=str(path), separator=".").identity("d") != Source(files=str(path)).identity("d")


@pytest.mark.parametrize(
    ("name", "first_word"),
    [("python-docs", "The"), ("bible", "Genesis"), ("dialogue", "What")],
)
def test_builtin_domains_carry_text(name: str, first_word: str) -> None:
    documents = read(Source(builtin=name))  # type: ignore[arg-type]
    assert documents[0].lstrip().startswith(first_word)
    assert sum(map(len, documents)) > 200_000


def test_bible_documents_are_chapters() -> None:
    documents = read(Source(builtin="bible"))
    assert len(documents) == 1189
    assert documents[0].split("\n")[1] == "In the beginning God created the heaven and the earth."


def test_python_source_is_the_standard_library_up_to_its_limit() -> None:
    files = BUILTIN["python-source"].find()
    size = sum(path.stat().st_size for path in files)
    assert 0.9 * PYTHON_SOURCE_BYTES < size <= PYTHON_SOURCE_BYTES
    assert not any({"test", "tests", "site-packages", "pydoc_data"} & set(path.parts) for path in files)
    documents = read(Source(builtin="python-source"))
    assert len(documents) == len(files)
    assert any("\nimport " in document for document in documents[:20])


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (Source(), "data.domains.d needs exactly one of hub, saved, files, builtin, generated, but has none of them."),
        (
            Source(hub="a", builtin="bible"),
            "builtin, generated, but has hub and builtin.",
        ),
        (Source(files=[]), "has none of them"),
        (Source(files="x", revision="v1"), "data.domains.d.revision goes with 'hub' only, but the source is 'files'."),
        (Source(builtin="bible", separator="x"), "data.domains.d.separator goes with 'files' only"),
        (
            Source(files="x", split="dev"),
            "data.domains.d.split goes with 'hub' and 'saved' only, but the source is 'fi",
        ),
        (Source(files="x", separator=""), "data.domains.d.separator is empty"),
        (Source(builtin="bible", streaming=True), "data.domains.d.streaming goes with 'hub' and 'files' only, but"),
        (Source(saved="x", streaming=True), "the source is 'saved', which is small enough: leave it out."),
        (Source(builtin="torah"), "is 'torah': it must be one of python-source, python-docs, bible, dialogue."),  # type: ignore[arg-type]
        (Source(files="x", max_blocks=0), "data.domains.d.max_blocks is 0: it must be at least 1, or null."),
        (
            Source(files="x", max_blocks=2.5),
            "data.domains.d.max_blocks is 2.5: it must be a whole number, at least 1, or null.",
        ),  # type: ignore[arg-type]
        (Source(files=3), "data.domains.d.files is 3: it must be a path, a glob, or a list of these."),  # type: ignore[arg-type]
        (Source(files=["x", 3]), "data.domains.d.files is ['x', 3]: it must be a path"),  # type: ignore[list-item]
        (Source(files="x", text=None), "data.domains.d.text is None: it must be a text."),  # type: ignore[arg-type]
        (Source(files="x", streaming="yes"), "data.domains.d.streaming is 'yes': it must be true or false."),  # type: ignore[arg-type]
    ],
)
def test_settings_that_cannot_work_are_refused_unseen(source: Source, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        source.check("d")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"files": "{}/none.txt"}, "data.domains.d.files is '{}/none.txt', but there is no such file."),
        ({"files": "{}/*.md"}, "there is no such file"),
        ({"files": "{}"}, "data.domains.d.files names the directory '{}'; name its files"),
        ({"files": "pkg://no_such_package_here"}, "'pkg://no_such_package_here' is incomplete"),
        ({"files": "pkg://no_such_package_here/x"}, "needs the Python package 'no_such_package_here', which is not"),
        ({"saved": "{}/none"}, "data.domains.d.saved is '{}/none', but there is no such directory."),
        ({"saved": "{}"}, "data.domains.d cannot be loaded: "),
        ({"saved": "{}/many", "split": "dev"}, "data.domains.d.split is 'dev', but must be one of train."),
        (
            {"saved": "{}/many", "text": "content"},
            "data.domains.d.text is 'content', but the data set has only: n, text.",
        ),
        ({"saved": "{}/many", "text": "n"}, "data.domains.d.text is 'n', but that field holds int, not text: name an"),
        ({"files": "{}/chats.jsonl"}, "holds list, not text: name another one, or make it text first (chats: with the"),
        ({"files": "{}/chats.parquet"}, "holds list, not text: name another one, or make it text first (chats: with"),
        ({"files": "{}/broken.txt.gz"}, "data.domains.d.files names {}/broken.txt.gz, which cannot be read: "),
        ({"files": "{}/cut-off.txt.gz"}, "data.domains.d.files names {}/cut-off.txt.gz, which cannot be read: "),
        ({"files": "{}/x.tar.gz"}, "data.domains.d.files names {}/x.tar.gz: unpack it first; of compressed files, .gz"),
        ({"files": "{}/x.jsonl.zst"}, "data.domains.d.files names {}/x.jsonl.zst: unpack it first"),
        ({"files": "{}/empty.csv"}, "data.domains.d.files names {}/empty.csv, which cannot be read: Empty CSV file."),
        ({"files": "{}/empty.parquet"}, "empty.parquet, which is not a Parquet file."),
        ({"files": "{}/uneven.csv"}, "data.domains.d.files names {}/uneven.csv, which cannot be read: CSV parse error"),
        ({"files": "{}/latin.csv"}, "data.domains.d.files names {}/latin.csv, which cannot be read: "),
        (
            {"files": "{}/rows.tsv", "text": "x"},
            "data.domains.d.text is 'x', but {}/rows.tsv has only: id, text.",
        ),
        ({"files": "{}/r.parquet", "text": "content"}, "r.parquet has only: n, text."),
        ({"files": "{}/fake.parquet"}, "fake.parquet, which is not a Parquet file."),
        ({"files": "{}/rows.jsonl", "text": "content"}, "'content', but line 1 of {}/rows.jsonl has only: id, text."),
        ({"files": "{}/rows.jsonl"}, "rows.jsonl, whose line 2 is not a JSON object: write one object a line"),
        ({"files": "{}/latin.txt"}, "data.domains.d.files names {}/latin.txt, which is not UTF-8 text."),
    ],
)
def test_what_is_missing_or_unreadable_is_named(tmp_path: Path, options: dict[str, str], sentence: str) -> None:
    table = datasets.Dataset.from_dict({"text": ["x"], "n": [1]})
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "many"))
    table.to_parquet(str(tmp_path / "r.parquet"))
    (tmp_path / "fake.parquet").write_text("no")
    (tmp_path / "rows.jsonl").write_text('{"id": 1, "text": "x"}\n["y"]\n')
    (tmp_path / "latin.txt").write_bytes("über".encode("latin-1"))
    (tmp_path / "latin.csv").write_bytes("text\nüber".encode("latin-1"))
    (tmp_path / "chats.jsonl").write_text('{"text": [{"role": "user", "content": "x"}]}')
    datasets.Dataset.from_dict({"text": [[{"role": "user"}]]}).to_parquet(str(tmp_path / "chats.parquet"))
    (tmp_path / "broken.txt.gz").write_text("no")
    (tmp_path / "cut-off.txt.gz").write_bytes(gzip.compress(b"long" * 100)[:-9])
    (tmp_path / "rows.tsv").write_text("id\ttext\n")
    (tmp_path / "uneven.csv").write_text("id,text\n1,x\n2\n")
    for name in ("x.tar.gz", "x.jsonl.zst", "empty.csv", "empty.parquet"):
        (tmp_path / name).write_bytes(b"")
    source = Source(**{key: value.format(tmp_path) for key, value in options.items()})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=re.escape(sentence.format(tmp_path))):
        read(source)


@pytest.mark.usefixtures("no_network")
def test_a_hub_data_set_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to the hub\nand a long explanation")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ConfigError, match=r"^data.domains.d cannot be loaded: no route to the hub\.$"):
        read(Source(hub="org/name"))
