"""Where an export goes: what may be there before, and how it takes its name without anything getting lost."""

import os
import re
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import count
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from lightprune.errors import ConfigError
from lightprune.export.card import is_model_card

# A scheme has two letters at least: one is a drive of Windows. `Path` makes one slash of two.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")

# The files of an export: the model's, and those of all kinds of tokenizers.
_FILES = (
    "README.md",
    "pruning_plan.json",
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "*processor_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template.jinja",
    "additional_chat_templates",
)


def check_target(path: str | Path, *, overwrite: bool, key: str = "path") -> Path:
    """Where an export may go.

    Args:
        path: the directory to write.
        overwrite: whether an earlier export may be replaced.
        key: the setting that names it, for what errors say.

    Returns:
        `path` as a `Path`, with `~` expanded.

    Raises:
        ConfigError: it exists and `overwrite` is not set, it exists and is no earlier export or holds anything that an
            export does not write, or nothing can be there.
    """
    if not path:
        raise ConfigError(f"The output is {path!r}: name the directory to write in `{key}`.")
    if _URL.match(str(path)):
        raise ConfigError(
            f"The output is {str(path)!r}, a URL: name a local directory in `{key}`, and upload what is written there."
        )
    try:
        target = Path(path).expanduser()
    except RuntimeError as error:  # the home of somebody unknown
        raise ConfigError(
            f"The output is {str(path)!r}, and no such home directory is known: choose another `{key}`."
        ) from error
    above = next((parent for parent in target.absolute().parents if parent.exists()), target)
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ConfigError(
            f"The output {str(target)!r} cannot be made, since {str(above)!r} is no directory that one may write to: "
            f"choose another `{key}`."
        )
    if not os.path.lexists(target):
        return target
    if not overwrite:
        raise ConfigError(
            f"The output {str(target)!r} exists already: choose another `{key}`, or set `overwrite: true` to replace "
            "it."
        )
    if not is_model_card(target / "README.md"):
        raise ConfigError(
            f"The output {str(target)!r} exists and is no export of lightprune's, so `overwrite` will not replace it: "
            f"choose another `{key}`."
        )
    others = sorted(name for name in os.listdir(target) if not any(fnmatch(name, file) for file in _FILES))
    if others:
        raise ConfigError(
            f"The output {str(target)!r} holds {', '.join(map(repr, others))} beside an earlier export, so `overwrite` "
            f"will not replace it: choose another `{key}`."
        )
    return target


def make_draft(target: Path) -> Path:
    """Make the directory in which an export is written and verified, beside the one that it will be.

    Its name tells what is in it if the process is killed: `<name>-unverified`, with the first number that is free.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for draft in _numbered(target, "unverified"):
        if os.path.lexists(reason_file(draft)):
            continue
        try:
            draft.mkdir()
        except FileExistsError:
            continue
        return draft
    raise AssertionError("there is always another number")


def reason_file(draft: Path) -> Path:
    """The file beside a draft that says why it could not be verified."""
    return draft.with_name(f"{draft.name}.txt")


def free_beside(target: Path) -> Path:
    """A name that nothing has: `<name>-2`, or the first number after that which is free."""
    numbered = (target.with_name(f"{target.name}-{number}") for number in count(2))
    return next(path for path in numbered if not os.path.lexists(path))


def put_in_place(draft: Path, target: Path) -> None:
    """Give a draft its final name. An earlier export moves to `<name>-older` first, and is removed afterwards.

    No directory can replace another one at once. At every moment, also when the process is killed, both are there whole
    under names that can be found; an error or an interrupt in between gives the older one its name back.
    """
    if not os.path.lexists(target):
        draft.rename(target)
        return
    older = next(path for path in _numbered(target, "older") if not os.path.lexists(path))
    try:
        target.rename(older)
        draft.rename(target)
    except BaseException:
        if not os.path.lexists(target):
            older.rename(target)
        raise
    try:
        if older.is_symlink():
            older.unlink()
        else:
            shutil.rmtree(older)
    except OSError as error:
        rank_zero_warn(f"The earlier export could not be removed, and is now at {str(older)!r} ({error}).")


def _numbered(target: Path, what: str) -> Iterator[Path]:
    """`<name>-<what>`, `<name>-<what>-2`, and so on."""
    yield target.with_name(f"{target.name}-{what}")
    for number in count(2):
        yield target.with_name(f"{target.name}-{what}-{number}")
