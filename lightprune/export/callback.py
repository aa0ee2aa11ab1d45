"""`ExportHF`: the callback that writes the model when training ends."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lightprune.errors import ConfigError
from lightprune.export.card import Card
from lightprune.export.write import check_generation_config, check_target, export_hf
from lightprune.expressible import check_stock
from lightprune.finish import FinishingCallback
from lightprune.host import data_of, find_causal_lm
from lightprune.hub import Dtype, torch_dtype
from lightprune.pipeline import Pipeline
from lightprune.strategies import engine_of


class ExportHF(FinishingCallback):
    """Writes the model as a Hugging Face directory at the end of training, or of a resume that finds nothing to train.

    Works with any `LightningModule` that holds a Hugging Face causal LM. If a cut was planned and has not happened by
    the end of training, nothing is written.

    Args:
        path: the directory to write; it must not exist.
        overwrite: replace an earlier export at `path`, once the new one is verified, if nothing else is there.
        dtype: dtype of the exported weights; None keeps that of the model.
    """

    def __init__(self, path: str, overwrite: bool = False, dtype: Dtype | None = None) -> None:
        self.path = path
        self.overwrite = overwrite
        self.dtype = dtype
        self._last_validation: dict[str, float] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._last_validation = {}
        if stage == "fit":
            _check_apart(check_target(self.path, overwrite=self.overwrite), trainer)
            if self.dtype is not None:
                torch_dtype(self.dtype)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        lm = find_causal_lm(pl_module)[1]
        check_generation_config(lm)
        if Pipeline.of(trainer) is None:  # else the plan was checked
            check_stock(lm)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep what this validation logged: `trainer.callback_metrics` mixes it with what training logs."""
        if not trainer.sanity_checking:
            logged = trainer._logger_connector.metrics["log"]
            self._last_validation = {name: float(value) for name, value in logged.items()}

    def finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pipeline = Pipeline.of(trainer)
        if pipeline is not None and pipeline.cut is not None and not pipeline.cut.done:
            rank_zero_warn(f"Nothing is exported to {self.path!r}: training ended before the cut.")
            return
        lm = engine_of(trainer).whole(find_causal_lm(pl_module)[1])
        if lm is not None:
            target = export_hf(
                lm,
                self.path,
                tokenizer=tokenizer_of(trainer, pl_module),
                plan=None if pipeline is None else pipeline.executed,
                card=card_of(trainer, last_validation=self._last_validation),
                overwrite=self.overwrite,
                dtype=self.dtype,
            )
            rank_zero_info(f"Exported to {str(target)!r}, reloaded and compared.")
        trainer.strategy.barrier("lightprune.ExportHF")


def _check_apart(target: Path, trainer: L.Trainer) -> None:
    """Refuse a directory that the run itself will make, and that so would be there when the export comes."""
    made: dict[str, list[str | None]] = {
        "trainer.default_root_dir": [trainer.default_root_dir],
        "a ModelCheckpoint's `dirpath`": [getattr(saver, "dirpath", None) for saver in trainer.checkpoint_callbacks],
        "a logger's directory": [logger.save_dir for logger in trainer.loggers],
    }
    for name, paths in made.items():
        for path in filter(None, paths):
            if Path(path).absolute().is_relative_to(target.absolute()):
                raise ConfigError(
                    f"ExportHF.path is {str(target)!r}, where {name} lies: choose another `path`, such as "
                    f"{str(target / 'pruned')!r}."
                )


def card_of(trainer: L.Trainer, *, last_validation: Mapping[str, float] | None = None) -> Card:
    """What a trainer knows about its run, for the model card.

    Args:
        last_validation: what the last validation logged, by name.
    """
    pipeline = Pipeline.of(trainer)
    cuts = [] if pipeline is None else [cut for cut in pipeline.cuts if cut.done]
    metrics: dict[str, Mapping[str, float]] = {}
    for number, cut in enumerate(cuts, start=1):
        name = "the cut" if len(cuts) == 1 else f"cut {number}"
        metrics |= {f"{moment} {name}": values for moment, values in cut.metrics.items()}
    data: dict[str, Any] = {"optimizer steps": trainer.global_step}
    domains = getattr(data_of(trainer), "domain_names", ())
    if domains:
        data["domains"] = ", ".join(domains)
    return Card(
        parameters=cuts[-1].parameters | {"before": cuts[0].parameters["before"]} if cuts else {},
        data=data,
        metrics=metrics | {"last validation": last_validation or {}},
    )


def tokenizer_of(trainer: L.Trainer, module: L.LightningModule) -> PreTrainedTokenizerBase | None:
    """The `tokenizer` of the module or else of the data module; None if neither has one."""
    for owner in (module, data_of(trainer)):
        try:
            tokenizer = getattr(owner, "tokenizer", None)
        except ConfigError:  # a module whose source holds no tokenizer
            continue
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            return tokenizer
    return None
