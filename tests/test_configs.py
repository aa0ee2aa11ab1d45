"""Every YAML in `configs/`: in the composition that it is meant for, it parses and all of its classes can be built."""

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from lightprune import DomainReweighting
from lightprune.cli import LightpruneCLI
from lightprune.pipeline import Part
from lightprune.strategies import ExactDeepSpeedStrategy

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
# What each kind of them is about.
SECTIONS = {
    "methods": "trainer",
    "models": "model",
    "data": "data",
    "reweighting": "trainer",
    "strategies": "trainer",
}
# What the others are composed with.
USUAL = {"methods": "trsp", "models": "smollm2-135m", "data": "builtin"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


def composition(path: Path) -> list[Path]:
    """The configs that a user gives together with `path`, in order; a complete config stands alone."""
    if path.parent == ROOT / "configs":
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
    assert found >= {
        "quickstart.yaml",
        *(f"methods/{method}.yaml" for method in ("trsp", "elder", "shortgpt", "sleb", "drpruning")),
    }


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_builds(path: Path) -> None:
    cli = build(*composition(path))
    assert any(isinstance(callback, Part) for callback in cli.trainer.callbacks)
    assert cli.model is not None
    assert cli.datamodule is not None


@pytest.mark.parametrize("method", ["trsp", "dress", "sleb"])
def test_reweighting_goes_with_any_method(method: str) -> None:
    of_method = ROOT / "configs/methods" / f"{method}.yaml"
    alone = build(*composition(of_method)).trainer.callbacks
    together = build(*composition(of_method), ROOT / "configs/reweighting/robust.yaml").trainer.callbacks
    added = [callback for callback in together if isinstance(callback, DomainReweighting)]
    assert len(added) == 1
    assert added[0].reference == "source"
    assert len(together) == len(alone) + 1


@pytest.mark.parametrize("stage", [2, 3])
def test_strategies_go_with_any_method(stage: int) -> None:
    of_strategy = ROOT / f"configs/strategies/zero{stage}.yaml"
    strategy = build(*composition(ROOT / "configs/methods/drpruning.yaml"), of_strategy).trainer.strategy
    assert isinstance(strategy, ExactDeepSpeedStrategy)
    assert strategy.config["zero_optimization"]["stage"] == stage


def bare_keys(node: yaml.Node, lines: list[str], explained: bool = False) -> Iterator[str]:
    """The keys below `node` that no comment explains: one above it, on its line, or of the mapping that it is part of.

    What an object takes (`init_args`) and what a section holds (`trainer`) has to be explained key by key.
    """
    if isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            yield from bare_keys(entry, lines, explained)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line
            commented = explained or "#" in lines[line] or lines[line - 1].lstrip().startswith("#")
            is_section = key.start_mark.column == 0 and isinstance(value, yaml.MappingNode)
            is_frame = is_section or key.value in ("class_path", "init_args")
            if not commented and not is_frame:
                yield f"{line + 1}: {key.value}"
            is_object = key.value == "callbacks" or (
                isinstance(value, yaml.MappingNode) and any(inner.value == "class_path" for inner, _ in value.value)
            )
            yield from bare_keys(value, lines, commented and not is_frame and not is_object)


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_every_key_has_a_comment(path: Path) -> None:
    text = path.read_text()
    assert list(bare_keys(yaml.compose(text), text.splitlines())) == []


def test_a_key_without_a_comment_is_seen() -> None:
    text = """
# What is explained here is the file.
seed_everything: 0
trainer:
  # How long. (int)
  max_steps: 1
  log_every_n_steps: 1
  # What it does. (list of classes)
  callbacks:
    # The first. (class)
    - class_path: lightprune.RandomSelector
      init_args:
        drop: 1
        seed: 0  # of the draw
data:
  # Places. (dict)
  domains:
    one: {files: a}
"""
    assert list(bare_keys(yaml.compose(text), text.splitlines())) == ["7: log_every_n_steps", "13: drop"]


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_holds_only_its_own_part(path: Path) -> None:
    """A part of a composition must not set what belongs to another."""
    if path.parent.name in SECTIONS:
        assert set(yaml.safe_load(path.read_text())) <= {SECTIONS[path.parent.name], "seed_everything"}


def stated_defaults(path: Path) -> Iterator[tuple[type, str, str]]:
    """The class, the argument, and the default that the comment above it states."""
    owner, stated = "", None
    for line in path.read_text().splitlines():
        words = line.strip()
        if words.lstrip("- ").startswith("class_path:"):
            owner = words.partition("class_path:")[2].strip()
        comment = re.search(r"default: (.+)\)$", words) if words.startswith("#") else None
        if comment:
            stated = comment[1]
        elif stated is not None and not words.startswith("#"):
            if owner.startswith("lightprune."):
                module, _, name = owner.rpartition(".")
                yield getattr(importlib.import_module(module), name), words.partition(":")[0], stated
            stated = None


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_the_defaults_in_comments_are_those_of_the_classes(path: Path) -> None:
    for owner, argument, stated in stated_defaults(path):
        parameters = {}  # those of the bases too, which `**settings` reach
        for kind in reversed(owner.__mro__):
            parameters |= inspect.signature(kind.__init__).parameters
        default = parameters[argument].default if argument in parameters else inspect.Parameter.empty
        if default is None or isinstance(default, (bool, int, float, str)):
            read = float(stated) if isinstance(default, float) else yaml.safe_load(stated)
            assert read == default, (owner, argument)


def test_some_comments_state_defaults() -> None:
    assert len([entry for path in CONFIGS for entry in stated_defaults(path)]) > 50
