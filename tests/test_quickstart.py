"""`make quickstart`: what it says first, and the text that its end shows."""

import os
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.export.models import word_tokenizer
from tests.families import tiny_lm

ROOT = Path(__file__).parents[1]


def make(*arguments: str) -> list[str]:
    # As from a terminal: the tests themselves may have been started by make.
    own = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    finished = subprocess.run(["make", *arguments], cwd=ROOT, env=own, capture_output=True, text=True, check=True)
    return finished.stdout.splitlines()


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_times_come_first(tmp_path: Path) -> None:
    said = make("quickstart-times", f"VENV={tmp_path}")
    assert [line.split(":")[0] for line in said] == ["Set-up, only this time", "Pruning on two CPU cores"]
    assert said[1].count("minutes") == 2
    # Where everything is installed, only the second counts.
    (tmp_path / "quickstart.stamp").touch()
    assert make("quickstart-times", f"VENV={tmp_path}") == said[1:]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_set_up_says_what_it_does(tmp_path: Path) -> None:
    commands = make("--dry-run", "quickstart", f"VENV={tmp_path / 'new'}")
    assert "Pruning on two CPU cores" in commands[1]  # before anything is installed
    for index, command in enumerate(commands):
        if "pip install" in command:
            assert "--quiet" not in command
            assert commands[index - 1].startswith('echo "== Set-up: ')


def test_the_example_writes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = tiny_lm()
    lm.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    example = runpy.run_path(str(ROOT / "examples" / "write.py"))
    example["main"]([str(tmp_path)])
    count = len(example["BEGINNINGS"])
    title, *lines = capsys.readouterr().out.splitlines()[-count - 1 :]
    assert title == f"{tmp_path} ({lm.num_parameters():,} parameters) writes"
    assert all(line.startswith("    w") for line in lines)
