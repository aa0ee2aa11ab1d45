"""The documents say what the benchmarks' results say."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("tables")


@pytest.mark.parametrize("name", ["docs/measurements.md", "benchmarks/README.md"])
def test_documents_are_up_to_date(name: str, tables: ModuleType) -> None:
    text = (BENCHMARKS.parent / name).read_text()
    assert "<!-- table: " in text
    assert tables.filled(text) == text


def test_every_table_stands_in_a_document(tables: ModuleType) -> None:
    texts = "".join(path.read_text() for path in tables.DOCUMENTS)
    assert all(texts.count(f"<!-- table: {name} -->") == 1 for name in tables.TABLES)
