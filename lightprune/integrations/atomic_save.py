"""Checkpoints that appear whole or not at all, files and DeepSpeed's directories alike.

Lightning writes a file below TMPDIR and moves it, which on another file system than the checkpoint's is a copy over the
old one; DeepSpeed writes into the old directory. If a process is killed meanwhile, no checkpoint is left.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import Strategy

from lightprune.integrations.lightning import shadow_method


def save_atomically(strategy: Strategy) -> Callable[[], None]:
    """Let a strategy write each checkpoint beside its place, and move it there when all ranks have written theirs.

    Checkpoints in remote storage, which appear whole anyway, and those of `AsyncCheckpointIO` are left as they are.

    Returns:
        What undoes this.
    """

    def save(
        original: Callable[..., None],
        checkpoint: dict[str, object],
        filepath: str | Path,
        storage_options: object = None,
    ) -> None:
        # Lightning 2.6.6: `_checkpoint_io`; the public property makes a default one. Without it asynchronous saves
        # would be moved before they are written.
        if "://" in str(filepath) or isinstance(strategy._checkpoint_io, AsyncCheckpointIO):
            original(checkpoint, filepath, storage_options)
            return
        target: Path = strategy.broadcast(Path(filepath))
        draft = target.with_name(f"{target.name}.part")
        if strategy.is_global_zero:
            _remove(draft)
        strategy.barrier()
        original(checkpoint, draft, storage_options)
        strategy.barrier()
        if strategy.is_global_zero:
            put_in_place(draft, target)

    return shadow_method(strategy, "save_checkpoint", save)


def put_in_place(draft: Path, target: Path) -> None:
    """Move a checkpoint to where an older one may be; at every moment one of them is there whole.

    A directory cannot replace another one, nor a file: between two renames the older checkpoint has a name that
    `ckpt_path="last"` finds.
    """
    if not target.exists() or (target.is_file() and draft.is_file()):
        draft.replace(target)
        return
    older = target.with_name(f"{target.stem}-older{target.suffix}")
    _remove(older)
    target.rename(older)
    draft.rename(target)
    older.rename(draft)
    _remove(draft)


def _remove(path: Path) -> None:
    """Remove a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
