"""`History`: what happened over a run, in bounded size."""

from collections.abc import Iterator, Mapping
from typing import Any


class History:
    """Keeps at most so many rows, spread evenly over all that were appended.

    When it is full, every second row goes, and from then on only every second, fourth, ... of those appended is kept.

    Args:
        capacity: even, at least 2.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._rows: list[dict[str, object]] = []
        self._appended = 0
        self._stride = 1

    def append(self, row: Mapping[str, object]) -> None:
        """Add a row of plain values."""
        if self._appended % self._stride == 0:
            if len(self._rows) == self.capacity:
                self._rows = self._rows[::2]
                self._stride *= 2
            if self._appended % self._stride == 0:
                self._rows.append(dict(row))
        self._appended += 1

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, object]]:
        return iter(self._rows)

    def column(self, name: str) -> list[object]:
        """One value of each row."""
        return [row[name] for row in self._rows]

    def state_dict(self) -> dict[str, Any]:
        return {"rows": [dict(row) for row in self._rows], "appended": self._appended, "stride": self._stride}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._rows = [dict(row) for row in state["rows"]]
        self._appended, self._stride = state["appended"], state["stride"]
