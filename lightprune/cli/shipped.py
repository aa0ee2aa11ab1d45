"""The configs and launch scripts that come with lightprune: found by name, listed, copied. Imports nothing heavy."""

import re
import shutil
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import lightprune
from lightprune.errors import ConfigError

FOLDERS = ("configs", "launch")
USAGE = """\
usage: lightprune configs [NAME | --copy DIRECTORY]

List the configs that come with lightprune, print the one called NAME, or copy all of them, and the launch scripts, to
DIRECTORY.
"""


def root() -> Path:
    """The directory that holds `configs` and `launch`: inside the package where it was installed, else the clone's."""
    package = Path(lightprune.__file__).parent
    installed = package / "shipped"
    return installed if installed.is_dir() else package.parent


def names() -> list[str]:
    """The configs that come with lightprune, as `--config` takes them: `methods/trsp.yaml`."""
    configs = root() / "configs"
    return sorted(file.relative_to(configs).as_posix() for file in configs.rglob("*.yaml"))


def find(name: str) -> Path | None:
    """The shipped config of this name, `methods/trsp.yaml` or `configs/methods/trsp.yaml`; None if there is none."""
    short = name.removeprefix("./").removeprefix("configs/")
    return root() / "configs" / short if short in names() else None


def resolve(arguments: Sequence[str]) -> list[str]:
    """The arguments, where each `--config` that is no local file and has the name of a shipped config is that one."""
    resolved = list(arguments)
    for index, argument in enumerate(resolved):
        if index and resolved[index - 1] in ("-c", "--config"):
            resolved[index] = _resolved(argument)
        elif argument.startswith("--config="):
            resolved[index] = f"--config={_resolved(argument.removeprefix('--config='))}"
    return resolved


def near(name: str) -> str:
    """` (did you mean ...?)` for the shipped config whose name is nearest, or where the shipped ones are listed."""
    found = get_close_matches(name.removeprefix("configs/"), names(), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def answer(arguments: Sequence[str]) -> str:
    """What `lightprune configs` prints; copies first, if that is asked for.

    Raises:
        ConfigError: there is no such config, or the directory has one of the folders already.
    """
    match list(arguments):
        case []:
            return "".join(f"{name:<32}{_sentence(root() / 'configs' / name)}\n" for name in names())
        case ["-h" | "--help"]:
            return USAGE
        case ["--copy", directory]:
            return _copy(Path(directory).expanduser())
        case [name] if not name.startswith("-"):
            file = find(name)
            if file is None:
                raise ConfigError(f"There is no shipped config {name!r}{near(name)}: `lightprune configs` lists them.")
            return file.read_text(encoding="utf-8")
    raise ConfigError("lightprune configs takes the name of one config, or --copy and a directory.")


def _resolved(file: str) -> str:
    if Path(file).expanduser().exists():
        return file
    found = find(file)
    return file if found is None else str(found)


def _sentence(file: Path) -> str:
    """The first sentence of a config's comment."""
    comment: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return textwrap.shorten(re.split(r"(?<=[.;])\s", " ".join(comment))[0], 100, placeholder=" ...")


def _copy(directory: Path) -> str:
    for folder in FOLDERS:
        if (directory / folder).exists():
            raise ConfigError(f"{directory / folder} is there already: give --copy another directory.")
    for folder in FOLDERS:
        shutil.copytree(root() / folder, directory / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return "".join(f"{directory / folder}\n" for folder in FOLDERS)
