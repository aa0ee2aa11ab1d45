"""A process may be killed at any moment of a save: there is always a whole checkpoint for `ckpt_path="last"`."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from lightprune.integrations.atomic_save import put_in_place, save_atomically
from tests.training import Plain, batches, trainer_for

PARTS = ("weights", "optimizer")


class Killed(BaseException):
    """The process is gone."""


def write(path: Path, content: str, *, directory: bool) -> None:
    """A checkpoint: one file, or as of DeepSpeed a directory of several."""
    if directory:
        path.mkdir()
        for part in PARTS:
            (path / part).write_text(content)
    else:
        path.write_text(content)


def read(path: Path) -> set[str]:
    files = [path / part for part in PARTS] if path.is_dir() else [path]
    return {file.read_text() for file in files}


def die_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the given change of the file system, and all after it, not happen."""
    calls = iter(range(100))

    def mortal(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, **kwargs: Any) -> Any:
            if next(calls) >= call:
                raise Killed
            return change(*args, **kwargs)

        return changed

    for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "unlink"), (os, "unlink"), (os, "rmdir")):
        monkeypatch.setattr(owner, name, mortal(getattr(owner, name)))


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("call", range(7))
def test_killed_at_any_moment(call: int, directory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft, target = tmp_path / "last.ckpt.part", tmp_path / "last.ckpt"
    write(target, "old", directory=directory)
    write(draft, "new", directory=directory)
    with monkeypatch.context() as patch, suppress(Killed):
        die_at(call, patch)
        put_in_place(draft, target)

    found = last_of(tmp_path)
    assert found is not None
    assert read(found) in ({"old"}, {"new"})

    newest = tmp_path / "newest"
    write(newest, "newest", directory=directory)
    put_in_place(newest, target)
    assert read(target) == {"newest"}
    assert last_of(tmp_path) == target


@pytest.mark.parametrize("directory", [False, True])
def test_a_strategy_may_have_saved_in_the_other_form(directory: bool, tmp_path: Path) -> None:
    draft, target = tmp_path / "last.ckpt.part", tmp_path / "last.ckpt"
    write(target, "old", directory=not directory)
    write(draft, "new", directory=directory)
    put_in_place(draft, target)
    assert read(target) == {"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def last_of(folder: Path) -> Path | None:
    """What Lightning takes for `ckpt_path="last"`."""
    trainer = trainer_for([ModelCheckpoint(folder)], max_steps=1, enable_checkpointing=True)
    trainer.checkpoint_callbacks[0].setup(trainer, Plain(), "fit")
    trainer.state.fn = TrainerFn.FITTING
    path = trainer._checkpoint_connector._parse_ckpt_path(TrainerFn.FITTING, "last", True, True)
    return None if path is None else Path(path)


def test_a_strategy_that_is_cut_off_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    trainer = trainer_for([], max_steps=1)
    trainer.fit(Plain(), batches(1))
    target = tmp_path / "last.ckpt"
    trainer.save_checkpoint(target)
    before = target.read_bytes()
    undo = save_atomically(trainer.strategy)

    class Unwilling:
        def __reduce__(self) -> Any:
            raise Killed

    with pytest.raises(Killed):
        trainer.strategy.save_checkpoint({"state_dict": Unwilling()}, target)
    assert target.read_bytes() == before
    trainer.strategy.save_checkpoint({"state_dict": {}}, target)
    assert torch.load(target, weights_only=True) == {"state_dict": {}}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    undo()
    assert "save_checkpoint" not in vars(trainer.strategy)
