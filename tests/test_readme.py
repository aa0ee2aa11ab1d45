"""What the documentation shows works: its examples run, its commands and configs parse, its links lead somewhere."""

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

import lightprune
from lightprune.cli import main
from lightprune.cli.benchmark import parser

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
# Modules whose names users may write beside those of `lightprune` itself.
PUBLIC_MODULES = ("anatomy", "costs", "data", "errors", "strategies", "testing")
# What a block of YAML is composed with.
USUAL = ("configs/methods/trsp.yaml", "configs/models/smollm2-135m.yaml", "configs/data/builtin.yaml")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str, mark: str = "") -> list[str]:
    """The code blocks of a page in a language, behind a mark."""
    return re.findall(rf"{re.escape(mark)}```{language}\n(.*?)```", path.read_text(), re.DOTALL)


def examples(path: Path) -> list[str]:
    """The Python blocks that are marked as run."""
    return blocks(path, "python", "<!-- tests/test_readme.py runs this example -->\n")


def commands() -> Iterator[list[str]]:
    """Every command in the documentation, in words."""
    for path in PAGES:
        for block in blocks(path, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                yield shlex.split(line, comments=True)


def lightprune_commands() -> list[tuple[str, ...]]:
    """The arguments of each `lightprune` command, also of those that go through Slurm."""
    found = [words[1:] for words in commands() if words[0] == "lightprune"]
    found += [["fit", *words[words.index("launch/fit.sbatch") + 1 :]] for words in commands() if words[0] == "sbatch"]
    return list(dict.fromkeys(map(tuple, found)))


def headings(path: Path) -> set[str]:
    """The anchors that GitHub makes of the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


def check_parses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Parse everything, print the config that results, and stop."""
    if arguments[0] == "benchmark":  # it has no config
        assert parser().parse_args(arguments[1:]).models
        return
    with pytest.raises(SystemExit) as ended:
        assert main([*arguments, "--print_config"]) == 0, capsys.readouterr().err
    assert ended.value.code == 0


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to run commands in, with a data config of the user's own."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copy(ROOT / "configs/data/text-files.yaml", tmp_path / "my-data.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", [path for path in PAGES if examples(path)], ids=name)
def test_examples_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one page run one after another."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for example in examples(path):
        exec(compile(example, name(path), "exec"), names)
    if path == README:
        assert AutoModelForCausalLM.from_pretrained("pruned").config.num_hidden_layers == 4


@pytest.mark.parametrize("arguments", lightprune_commands(), ids=" ".join)
def test_commands_parse(arguments: tuple[str, ...], clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_parses(list(arguments), capsys)


def test_other_commands_are_there() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands():
        program, *arguments = [word for word in words if not re.match(r"[A-Z_]+=", word)]
        if program == "make":
            assert arguments[0] in targets
        elif program == "python":
            assert (ROOT / arguments[0]).is_file()
        elif program == "sbatch":
            assert any((ROOT / word).is_file() for word in arguments)
        else:
            assert program == "lightprune"


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "yaml")], ids=name)
def test_configs_parse(path: Path, clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks(path, "yaml"):
        assert set(yaml.safe_load(block)) <= {"trainer", "model", "data", "seed_everything"}
        Path("block.yaml").write_text(block)
        check_parses(["fit", *(word for file in (*USUAL, "block.yaml") for word in ("--config", file))], capsys)


@pytest.mark.parametrize("path", LINKING, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def test_names_are_public() -> None:
    for path in LINKING:
        if path.name == "design.md":  # which is about the inside
            continue
        for first, second in re.findall(r"\b(?:lightprune|lp)\.([A-Za-z]\w*)(?:\.([A-Za-z]\w*))?", path.read_text()):
            if first in PUBLIC_MODULES:
                assert not second or hasattr(getattr(lightprune, first), second), f"{first}.{second} in {name(path)}"
            else:
                assert first in lightprune.__all__, f"{first} in {name(path)}"


def test_the_methods_of_the_table_exist() -> None:
    rows = [line for line in README.read_text().splitlines() if line.startswith("|")]
    named = set(re.findall(r"`([A-Z]\w+)`", "\n".join(rows)))
    assert named
    assert named - {"LightningModule"} <= set(lightprune.__all__)


def test_every_page_is_linked() -> None:
    text = README.read_text()
    assert all(f"(docs/{path.name})" in text for path in PAGES if path != README)


def test_length() -> None:
    assert len(README.read_text().splitlines()) < 150
