from pathlib import Path

import pytest
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser

from lightprune.data import Source, TextDataModule

CONFIGS = Path(__file__).parents[2] / "configs" / "data"


def instantiate(path: Path) -> TextDataModule:
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    parsed = parser.parse_string(path.read_text())
    datamodule = parser.instantiate_classes(parsed).data
    assert isinstance(datamodule, TextDataModule)
    return datamodule


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_are_what_they_say(path: Path) -> None:
    datamodule = instantiate(path)
    assert all(isinstance(source, Source) for source in datamodule.domains.values())
    assert datamodule.domain_names


def test_numbers_keep_their_kind() -> None:
    assert instantiate(CONFIGS / "builtin.yaml").validation == 8
    assert isinstance(instantiate(CONFIGS / "builtin.yaml").validation, int)
    assert instantiate(CONFIGS / "text-files.yaml").validation == 0.05
    articles = instantiate(CONFIGS / "text-files.yaml").domains["articles"]
    assert articles == Source(files=["data/articles-2024.jsonl", "data/articles-2025.parquet"])
