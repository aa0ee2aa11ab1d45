"""Reads the documents of files and data sets, one after another, in constant memory."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightprune.errors import ConfigError

if TYPE_CHECKING:
    import datasets

_CHUNK = 2**20  # characters


def key_of(domain: str) -> str:
    """Where a config names the domain."""
    return f"data.domains.{domain}"


def first_line(error: Exception) -> str:
    """What an error says first, or else its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def as_texts(values: Iterable[Any], field: str, domain: str) -> Iterator[str]:
    """The values of a text column; a null is an empty document, half of a surrogate pair (`\\ud800` in JSON) a "?".

    Raises:
        ConfigError: A value is not text.
    """
    for value in values:
        if value is not None and not isinstance(value, str):
            kind = type(value).__name__
            raise ConfigError(f"{key_of(domain)}.text is {field!r}, but that field holds {kind}, not text.")
        yield (value or "").encode("utf-8", "replace").decode()


def read_files(paths: Sequence[Path], field: str, separator: str | None, domain: str) -> Iterator[Any]:
    """Yields the documents of files, each read by its suffix: see `Source.files`.

    Raises:
        ConfigError: A file is not what its suffix says, or lacks the field.
    """
    for path in paths:
        try:
            if path.suffix == ".parquet":
                yield from _parquet(path, field, domain)
            elif path.suffix in (".jsonl", ".ndjson", ".json"):
                yield from _json_lines(path, field, domain)
            else:
                yield from _text(path, separator)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{key_of(domain)}.files names {path}, which is not UTF-8 text.") from error


def rows(dataset: "datasets.IterableDataset", field: str, domain: str) -> Iterator[Any]:
    """Yields a field of a streamed data set, never reading beyond the row that it yields.

    Raises:
        ConfigError: A row lacks the field, or cannot be read.
    """
    iterator = iter(dataset)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # of the network, the file system or the format
            raise ConfigError(f"{key_of(domain)} cannot be read on: {first_line(error)}.") from error
        if field not in row:
            raise _missing_field(field, row, "the data set", domain)
        yield row[field]


def column(dataset: "datasets.Dataset", field: str, domain: str) -> Iterator[Any]:
    """Yields a column of a data set that is all there.

    Raises:
        ConfigError: There is no such column.
    """
    if field not in dataset.column_names:
        raise _missing_field(field, dataset.column_names, "the data set", domain)
    for batch in dataset.select_columns([field]).with_format(None).iter(batch_size=256):
        yield from batch[field]


def _text(path: Path, separator: str | None) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        if separator is None:
            yield file.read()
            return
        rest = ""
        while chunk := file.read(_CHUNK):
            *documents, rest = (rest + chunk).split(separator)
            yield from documents
        yield rest


def _parquet(path: Path, field: str, domain: str) -> Iterator[Any]:
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key_of(domain)}.files names {path}, which is not a Parquet file.") from error
    with table:
        if field not in table.schema_arrow.names:
            raise _missing_field(field, table.schema_arrow.names, str(path), domain)
        for batch in table.iter_batches(batch_size=256, columns=[field]):
            yield from batch.column(0).to_pylist()


def _json_lines(path: Path, field: str, domain: str) -> Iterator[Any]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                row = None
            if not isinstance(row, dict):
                raise ConfigError(f"{key_of(domain)}.files names {path}, whose line {number} is not a JSON object.")
            if field not in row:
                raise _missing_field(field, row, f"line {number} of {path}", domain)
            yield row[field]


def _missing_field(field: str, there: Iterable[str], where: str, domain: str) -> ConfigError:
    return ConfigError(f"{key_of(domain)}.text is {field!r}, but {where} has only: {', '.join(sorted(there))}.")
