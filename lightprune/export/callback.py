"""`ExportHF`: the callback that writes the model when training ends."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightprune.errors import ConfigError, ExportError
from lightprune.export.card import Card, is_model_card
from lightprune.export.stock_check import check_stock
from lightprune.export.target import check_target, free_beside
from lightprune.export.tokenizer import Tokenizer, given_tokenizer, tokenizer_of, warn_of_none
from lightprune.export.write import check_generation_config, export_hf, keep_unverified
from lightprune.hub import Dtype, torch_dtype
from lightprune.integrations.lightning import data_of, find_causal_lm, logged_by_validation, shadow_method
from lightprune.pipeline import FinishingCallback, Pipeline
from lightprune.strategies import adapter_of


class ExportHF(FinishingCallback):
    """Writes the model as a Hugging Face directory at the end of training, or of a resume that finds nothing to train.

    Works with any `LightningModule` that holds a Hugging Face causal LM. If a cut was planned and has not happened by
    the end of training, nothing is written.

    A model that a stock class cannot hold, or does not compute the same with, is refused before training. Whatever goes
    wrong afterwards, what was trained is kept at `<path>-unverified`, with the reason in a text file beside it. The
    other callbacks finish their work, and then the fit ends with an `ExportError`.

    Args:
        path: the directory to write, on this machine; it must not exist. A resumed run that has no step left to train
            leaves an export there as it is.
        overwrite: replace an earlier export at `path`, once the new one is verified, if nothing else is there.
        dtype: dtype of the exported weights; None keeps that of each of them.
        tokenizer: the tokenizer to save beside the model: itself, its directory, or its Hub id. None takes what the
            module or the data module has as `tokenizer`, `processing_class` or `processor`, or as the `tokenizer` of
            one of these.

    Raises:
        ExportError: at the end of the fit, if the model could not be exported.
    """

    def __init__(
        self,
        path: str,
        overwrite: bool = False,
        dtype: Dtype | None = None,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
    ) -> None:
        self.path = path
        self.overwrite = overwrite
        self.dtype = dtype
        self.tokenizer = tokenizer
        self._last_validation: dict[str, float] = {}
        self._given: Tokenizer | None = None
        self._problem: str | None = None
        self._stays = False  # whether there is an export already, and nothing left to train

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._last_validation, self._problem = {}, None
        if stage == "fit":
            # An export may be this run's own, if it resumes at its last step. Only later is that known.
            exported = is_model_card(Path(os.path.expanduser(self.path), "README.md"))
            self._stays = exported and not self.overwrite
            _check_apart(check_target(self.path, overwrite=self.overwrite or exported), trainer)
            if self.dtype is not None:
                torch_dtype(self.dtype)
            self._given = given_tokenizer(self.tokenizer, "ExportHF.tokenizer")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        lm = find_causal_lm(pl_module)[1]
        check_generation_config(lm)
        # Beside a pipeline, adapters can only be those of its own, which it merges: others were refused.
        check_stock(lm, adapters_expected=Pipeline.of(trainer) is not None)
        if self._given is None and tokenizer_of(trainer, pl_module) is None:
            warn_of_none("ExportHF.tokenizer")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        check_target(self.path, overwrite=self.overwrite)
        self._stays = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep what this validation logged: `trainer.callback_metrics` mixes it with what training logs."""
        if not trainer.sanity_checking:
            self._last_validation = logged_by_validation(trainer)

    def finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pipeline = Pipeline.of(trainer)
        if pipeline is not None and pipeline.cut is not None and not pipeline.cut.done:
            rank_zero_warn(f"Nothing is exported to {self.path!r}: training ended before the cut.")
            return
        if self._stays:
            rank_zero_info(
                f"Nothing is left to train, and {self.path!r} stays as it is: set ExportHF.overwrite to true to "
                "replace it."
            )
            return
        lm = adapter_of(trainer).whole(find_causal_lm(pl_module)[1])
        problem = None if lm is None else self._export(trainer, pl_module, lm, pipeline)
        # Every rank waits for rank 0 here, and learns whether the fit has failed.
        self._problem = trainer.strategy.broadcast(problem)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """End the fit with an error if the model could not be exported, once everybody has finished."""
        problem, self._problem = self._problem, None
        if problem is None:
            return

        def fail(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
            restore()
            original(*args, **kwargs)
            raise ExportError(problem)

        # The module's `teardown` is the first hook that comes after those of all callbacks.
        restore = shadow_method(pl_module, "teardown", fail)

    def _export(
        self, trainer: L.Trainer, module: L.LightningModule, lm: PreTrainedModel, pipeline: Pipeline | None
    ) -> str | None:
        """Export, and say what went wrong; None if nothing did."""
        target = Path(self.path).expanduser()
        try:
            target = _target_now(self.path, self.overwrite)
            export_hf(
                lm,
                target,
                tokenizer=self._given or tokenizer_of(trainer, module),
                plan=None if pipeline is None else pipeline.executed,
                card=card_of(trainer, last_validation=self._last_validation),
                overwrite=self.overwrite,
                dtype=self.dtype,
            )
        except ExportError as error:
            return str(error)
        except Exception as error:  # nothing is written yet
            try:
                return str(keep_unverified(lm, target, str(error).rstrip(".")))
            except Exception as second:
                return f"The model could not be written to {str(target)!r}: {error} ({second})."
        rank_zero_info(f"Exported to {str(target)!r}, reloaded and compared.")
        return None


def _target_now(path: str, overwrite: bool) -> Path:
    """Where the export goes: something may have taken its place while training went on."""
    try:
        return check_target(path, overwrite=overwrite)
    except ConfigError as error:
        target = free_beside(Path(path).expanduser())
        rank_zero_warn(f"{error} That was not so when training began: the model goes to {str(target)!r}.")
        return check_target(target, overwrite=overwrite)


def _check_apart(target: Path, trainer: L.Trainer) -> None:
    """Refuse a directory that the run itself will create: it would exist when the export is written."""
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
    data: dict[str, object] = {"optimizer steps": trainer.global_step}
    domains = getattr(data_of(trainer), "domain_names", ())
    if domains:
        data["domains"] = ", ".join(domains)
    return Card(
        parameters=cuts[-1].parameters | {"before": cuts[0].parameters["before"]} if cuts else {},
        data=data,
        metrics=metrics | {"last validation": last_validation or {}},
    )
