"""Reads the documents of files and data sets, one after another, in constant memory."""

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lightprune.errors import ConfigError

if TYPE_CHECKING:
    import datasets

_CHUNK = 2**20  # characters
_ROW = 2**24  # bytes that a row of a table may have

_FORMATS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
}
_COMPRESSED: dict[str, Callable[..., object]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_PACKED = (".zst", ".lz4", ".zip", ".7z", ".rar", ".tar", ".tgz")


def key_of(domain: str) -> str:
    """Where a config names the domain."""
    return f"data.domains.{domain}"


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class name if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def as_texts(values: Iterable[object], field: str, domain: str) -> Iterator[str]:
    """The values of a text column; a null is an empty document, half of a surrogate pair (`\\ud800` in JSON) a "?".

    Raises:
        ConfigError: A value is not text.
    """
    for value in values:
        if value is not None and not isinstance(value, str):
            kind = type(value).__name__
            raise ConfigError(
                f"{key_of(domain)}.text is {field!r}, but that field holds {kind}, not text: name another one, or make "
                "it text first (chats: with the tokenizer's apply_chat_template)."
            )
        yield (value or "").encode("utf-8", "replace").decode()


def format_of(path: Path, key: str) -> str:
    """What a file's suffix says that it is: "parquet", "json", "csv", "tsv" or "text", compressed or not.

    Args:
        path: The file.
        key: What names the file in a config, for the error message.

    Raises:
        ConfigError: It is an archive, or compressed in a way that is not read here.
    """
    inner = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    suffix = inner.suffix.lower()
    if suffix in _PACKED or (suffix == ".parquet" and inner != path):
        raise ConfigError(
            f"{key} names {path}: unpack it first; of compressed files, .gz, .bz2 and .xz of text are read."
        )
    return _FORMATS.get(suffix, "text")


def read_files(paths: Sequence[Path], field: str, separator: str | None, domain: str) -> Iterator[object]:
    """Yields the documents of files, each read by its suffix: see `Source.files`.

    Raises:
        ConfigError: A file is not what its suffix says, or lacks the field.
    """
    key = f"{key_of(domain)}.files"
    for path in paths:
        kind = format_of(path, key)
        try:
            if kind == "parquet":
                yield from _parquet(path, field, domain)
            elif kind == "json":
                yield from _json_lines(path, field, domain)
            elif kind == "text":
                yield from _text(path, separator)
            else:
                yield from _table(path, field, domain, delimiter="," if kind == "csv" else "\t")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{key} names {path}, which is not UTF-8 text.") from error
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise ConfigError(f"{key} names {path}, which cannot be read: {first_line(error).rstrip('.')}.") from error


def rows(dataset: "datasets.IterableDataset", field: str, domain: str) -> Iterator[object]:
    """Yields a field of a streamed data set, never reading beyond the row that it yields.

    Raises:
        ConfigError: A row lacks the field, or cannot be read.
    """
    iterator = iter(dataset)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # of the network, the file system or the format
            raise ConfigError(f"{key_of(domain)} cannot be read to its end: {first_line(error)}.") from error
        if field not in row:
            raise _missing_field(field, row, "the data set", domain)
        yield row[field]


def column(dataset: "datasets.Dataset", field: str, domain: str) -> Iterator[object]:
    """Yields a column of a data set that is all there.

    Raises:
        ConfigError: There is no such column.
    """
    if field not in dataset.column_names:
        raise _missing_field(field, dataset.column_names, "the data set", domain)
    for batch in dataset.select_columns([field]).with_format(None).iter(batch_size=256):
        yield from batch[field]


def _open(path: Path, mode: str, **options: Any) -> IO[Any]:
    opener = _COMPRESSED.get(path.suffix.lower(), open)
    file: IO[Any] = opener(path, mode, **options)
    return file


def _text(path: Path, separator: str | None) -> Iterator[str]:
    with _open(path, "rt", encoding="utf-8-sig") as file:  # without the mark that some editors put first
        if separator is None:
            yield file.read()
        else:
            yield from _split(iter(lambda: file.read(_CHUNK), ""), separator)


def _split(chunks: Iterable[str], separator: str) -> Iterator[str]:
    """What `"".join(chunks).split(separator)` gives; reads every character once, however long a document is."""
    overlap = len(separator) - 1  # characters that may be the beginning of a separator
    pieces: list[str] = []
    rest = ""
    for chunk in chunks:
        first, *others = (rest + chunk).split(separator)
        if others:
            yield "".join([*pieces, first])
            yield from others[:-1]
            pieces, first = [], others[-1]
        seen = max(0, len(first) - overlap)
        pieces.append(first[:seen])
        rest = first[seen:]
    yield "".join([*pieces, rest])


def _table(path: Path, field: str, domain: str, delimiter: str) -> Iterator[object]:
    """A column of a table whose first line names the columns; a quoted cell may hold line breaks."""
    import pyarrow as pa
    from pyarrow import csv

    reading = csv.ReadOptions(block_size=_ROW)
    parsing = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    # All cells as they are written: else their type is guessed from the first ones.
    cells = csv.ConvertOptions(include_columns=[field], column_types={field: pa.string()})
    try:
        with _open(path, "rb") as file:
            names = csv.open_csv(file, read_options=reading, parse_options=parsing).schema.names
        if field not in names:
            raise _missing_field(field, names, str(path), domain)
        with _open(path, "rb") as file:
            for batch in csv.open_csv(file, read_options=reading, parse_options=parsing, convert_options=cells):
                yield from batch.column(0).to_pylist()
    except pa.ArrowException as error:
        raise OSError(first_line(error)) from error


def _parquet(path: Path, field: str, domain: str) -> Iterator[object]:
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key_of(domain)}.files names {path}, which is not a Parquet file.") from error
    with table:
        if field not in table.schema_arrow.names:
            raise _missing_field(field, table.schema_arrow.names, str(path), domain)
        for batch in table.iter_batches(batch_size=256, columns=[field]):
            yield from batch.column(0).to_pylist()


def _json_lines(path: Path, field: str, domain: str) -> Iterator[object]:
    with _open(path, "rt", encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                row = None
            if not isinstance(row, dict):
                raise ConfigError(
                    f"{key_of(domain)}.files names {path}, whose line {number} is not a JSON object: write one object "
                    "a line (JSON Lines)."
                )
            if field not in row:
                raise _missing_field(field, row, f"line {number} of {path}", domain)
            yield row[field]


def _missing_field(field: str, there: Iterable[str], where: str, domain: str) -> ConfigError:
    return ConfigError(f"{key_of(domain)}.text is {field!r}, but {where} has only: {', '.join(sorted(there))}.")
