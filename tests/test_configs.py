"""Every YAML in `configs/`: in the composition that it is meant for, it parses and all of its classes can be built."""

import re
import sys
from pathlib import Path

import pytest
import yaml

from lightprune.cli import LightpruneCLI
from lightprune.pipeline import Part

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
# What the others are composed with.
USUAL = {"methods": "trsp", "models": "smollm2-135m", "data": "builtin"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


def composition(path: Path) -> list[Path]:
    """The configs that a user gives together with `path`, in order; a complete config stands alone."""
    if path.parent.name not in USUAL:
        return [path]
    usual = {kind: ROOT / "configs" / kind / f"{stem}.yaml" for kind, stem in USUAL.items()}
    return list((usual | {path.parent.name: path}).values())


class BuildOnly(LightpruneCLI):
    """Builds everything that a config names and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Not this time."""


def build(*paths: Path) -> BuildOnly:
    return BuildOnly(["fit", *(argument for path in paths for argument in ("--config", str(path)))])


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightprune"])


def test_what_the_readme_promises_is_there() -> None:
    found = {name(path) for path in CONFIGS}
    assert found >= {"quickstart.yaml", *(f"methods/{method}.yaml" for method in ("trsp", "elder", "shortgpt", "sleb"))}


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_builds(path: Path) -> None:
    cli = build(*composition(path))
    assert any(isinstance(callback, Part) for callback in cli.trainer.callbacks)
    assert cli.model is not None
    assert cli.datamodule is not None


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_every_key_has_a_comment(path: Path) -> None:
    """A comment explains the keys below it, down to the next blank line or the next object."""
    explained, bare = False, []
    for line in path.read_text().splitlines():
        if "#" in line:
            explained = True
        elif not line.strip() or re.match(r"\s*(- )?(class_path|init_args):", line):
            explained = False
        elif re.match(r"\s*(- )?[\w/+-]+: *\S", line) and not explained:
            bare.append(line.strip())
    assert not bare


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_holds_only_its_own_part(path: Path) -> None:
    """A part of a composition must not set what belongs to another."""
    sections = {"methods": {"trainer"}, "models": {"model"}, "data": {"data"}}.get(path.parent.name)
    if sections is not None:
        assert set(yaml.safe_load(path.read_text())) <= sections | {"seed_everything"}
