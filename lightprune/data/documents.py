"""Reads the documents of a streaming source from the place on where an earlier run stopped."""

from collections.abc import Iterator, Mapping
from itertools import islice

from lightprune.data.readers import as_texts, rows
from lightprune.data.sources import Source


class DocumentStream(Iterator[str]):
    """The documents of a source, one after another, without the first ones.

    Args:
        source: The text of a domain.
        domain: For the error messages.
        read: How many documents to leave out.
        place: What `place` was behind them. A hub data set goes on there without reading what lies before; files are
            read again up to there, which is fast next to tokenizing.

    Attributes:
        read: How many documents lie behind, those left out included.
    """

    def __init__(self, source: Source, domain: str, read: int = 0, place: Mapping[str, object] | None = None) -> None:
        self._hub = None if source.hub is None else source.load_stream(domain)
        if self._hub is None:
            self._texts = source.documents(domain)
            self.read = 0
            self.skip_to(read)
            return
        if place is not None:
            self._hub.load_state_dict(place)
        self._texts = as_texts(rows(self._hub, source.text, domain), source.text, domain)
        self.read = read

    def __next__(self) -> str:
        text = next(self._texts)
        self.read += 1
        return text

    def skip_to(self, read: int) -> None:
        """Reads until `read` documents have been skipped."""
        for _ in islice(self, read - self.read):
            pass

    @property
    def place(self) -> dict[str, object] | None:
        """The position in a hub data set, as plain Python; None for files."""
        return None if self._hub is None else self._hub.state_dict()
