"""What is imported when: the package and the command line's first answers without torch, the rest when it is used."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lightprune
from lightprune.cli.app import _OTHERS
from lightprune.data import TextDataModule
from lightprune.selectors import LayerGateSelector

# Runs `main` with the arguments of the process, then says on the last line which modules there are.
MAIN = """
import json, sys
from lightprune.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit:
    status = 0
print(json.dumps([status, sorted(sys.modules)]))
"""
ROOT = {"PYTHONPATH": str(Path(__file__).parents[1])}


def imported(script: str, *arguments: str, folder: Path) -> tuple[int, set[str]]:
    """What a script's last line says, run in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
    finished = subprocess.run(
        command, cwd=folder, env=os.environ | ROOT, capture_output=True, text=True, timeout=600, check=True
    )
    status, modules = json.loads(finished.stdout.splitlines()[-1])
    return status, set(modules)


def test_the_package_by_itself_imports_nothing_heavy(tmp_path: Path) -> None:
    script = "import json, sys, lightprune; lightprune.ConfigError; print(json.dumps([0, sorted(sys.modules)]))"
    _, modules = imported(script, folder=tmp_path)
    assert {"lightprune", "lightprune.errors"} <= modules
    assert not modules & {"torch", "lightning", "transformers", "numpy", "datasets", "rich"}


@pytest.mark.parametrize(
    ("status", "arguments"),
    [(0, ["--help"]), (0, ["--version"]), (2, []), (2, ["fitt"]), (2, ["fit", "--config", "none.yaml"])],
)
def test_first_answers_need_no_torch(tmp_path: Path, status: int, arguments: list[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found, modules = imported(MAIN, *arguments, folder=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert found == status
    assert not modules & {"torch", "lightning", "transformers", "numpy"}
    # A tenth of a second here; with torch it would be several.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


@pytest.mark.parametrize(
    ("status", "arguments", "unused"),
    [
        (
            0,
            ["fit", "--help"],
            {"lightprune.anatomy", "lightprune.callbacks.run_report", "transformers.modeling_utils"},
        ),
        (2, ["fit", "--trainer.max_stepz=1"], {"lightprune.anatomy", "transformers.modeling_utils"}),
        (
            2,
            ["fit", "--config", "config.yaml", "--trainer.max_stepz=1"],
            {"lightprune.export", "lightprune.cli.forecast"},
        ),
        (2, ["fit", "--config", "config.yaml", "--callback.LayerGateSelector.dropp=1"], {"lightprune.export"}),
    ],
)
def test_a_mistake_is_found_before_what_it_does_not_need(
    tmp_path: Path, status: int, arguments: list[str], unused: set[str]
) -> None:
    config = {
        "trainer": {"callbacks": [{"class_path": "lightprune.LayerGateSelector", "init_args": {"drop": 1}}]},
        "model": {"class_path": "lightprune.CausalLM", "init_args": {"model": "none"}},
        "data": {
            "class_path": "lightprune.data.TextDataModule",
            "init_args": {"domains": {"plays": {"files": "plays.txt"}}},
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    found, modules = imported(MAIN, *arguments, folder=tmp_path)
    assert found == status
    assert "lightning.pytorch.cli" in modules
    assert not modules & ({"datasets", "pandas", "deepspeed", "peft"} | unused)


def test_public_names_are_there_when_asked_for() -> None:
    assert {name: getattr(lightprune, name).__name__ for name in lightprune.__all__} == {
        name: name for name in lightprune.__all__
    }
    assert set(lightprune.__all__) <= set(dir(lightprune))
    assert lightprune.LayerGateSelector is LayerGateSelector
    assert lightprune.data.TextDataModule is TextDataModule
    assert lightprune.strategies.adapter_of is not None
    with pytest.raises(AttributeError, match="has no attribute 'LayerGate'"):
        _ = lightprune.LayerGate


TO_DERIVE_FROM = {"LayerSelector", "Part", "PruningCallback", "Regularizer", "Selector", "UnitSelector"}


def test_help_names_the_callbacks() -> None:
    """Those that the parser cannot name, as it knows only imported classes."""
    from lightning.pytorch.callbacks import Callback

    callbacks = {name for name in lightprune.__all__ if name not in _OTHERS}
    assert callbacks == {
        name
        for name in lightprune.__all__
        if isinstance(getattr(lightprune, name), type)
        and issubclass(getattr(lightprune, name), Callback)
        and name not in TO_DERIVE_FROM
    }
