"""`PruningTrainer`: a Trainer with the verbs `plan` and `export`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lightprune.cli.forecast import forecast
from lightprune.errors import ConfigError
from lightprune.export import (
    ExportHF,
    card_of,
    check_target,
    export_hf,
    given_tokenizer,
    tokenizer_of,
    warn_of_none,
)
from lightprune.host import find_causal_lm
from lightprune.pipeline import Part, Pipeline
from lightprune.plan import PruningPlan
from lightprune.stock_check import check_stock


class PruningTrainer(pl.Trainer):
    """A Trainer with the two verbs that need a model and no training."""

    def plan(self, model: pl.LightningModule, datamodule: pl.LightningDataModule | None = None) -> None:
        """Print what a config would cut, when, and the shape that results; trains nothing."""
        with self._pipeline(model, stage="fit") as pipeline:
            Console().print(forecast(pipeline))

    def export(
        self,
        model: pl.LightningModule,
        ckpt_path: str,
        output: str,
        datamodule: pl.LightningDataModule | None = None,
        overwrite: bool = False,
        weights_only: bool | None = None,
        tokenizer: str | None = None,
    ) -> None:
        """Write the model of a checkpoint as a Hugging Face directory.

        Args:
            model: the module that was trained.
            ckpt_path: a checkpoint of a run with the same config; "last" is the newest of its `ModelCheckpoint`.
            output: the directory to write, on this machine.
            datamodule: only its tokenizer is used.
            overwrite: replace `output` if it exists.
            weights_only: as in `fit`.
            tokenizer: directory or Hub id of the tokenizer to save beside the model; null takes that of the config's
                `ExportHF`, of the model or of the data.
        """
        if ckpt_path == "last":
            ckpt_path = _last_of(self)
        check_target(output, overwrite=overwrite, key="output")
        given = given_tokenizer(tokenizer, "tokenizer") or _configured_tokenizer(self)
        with self._pipeline(model, stage="validate") as pipeline:
            # The pipeline gives the model its shape; states and weights are for us to load.
            checkpoint = self.strategy.load_checkpoint(ckpt_path, weights_only=weights_only)
            plan = restore(pipeline, checkpoint, source=ckpt_path)
            pipeline.finish()
            card = card_of(self)
            card["data"] = {"optimizer steps": checkpoint["global_step"]}
            found = given or tokenizer_of(self, model, datamodule)
            if found is None:
                warn_of_none("tokenizer")
            check_stock(pipeline.lm)
            target = export_hf(pipeline.lm, output, tokenizer=found, plan=plan, card=card, overwrite=overwrite)
        print(f"Exported to {target}")

    @contextmanager
    def _pipeline(self, model: pl.LightningModule, *, stage: str) -> Iterator[Pipeline]:
        """The pipeline of the trainer's callbacks around the built model, as `fit` would make it."""
        self.strategy.connect(model)
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Part):
                callback.setup(self, model, stage)
        pipeline = Pipeline.of(self)
        if pipeline is None or pipeline.cut is None:
            raise ConfigError("Nothing is to be cut: add a selector and a StructuredCut to trainer.callbacks.")
        try:
            model.configure_model()
            yield pipeline
        finally:
            pipeline.close()


def _configured_tokenizer(trainer: pl.Trainer) -> PreTrainedTokenizerBase | None:
    """What the config's `ExportHF` names, if it has one and that names any."""
    exports = [c for c in trainer.callbacks if isinstance(c, ExportHF)]  # type: ignore[attr-defined]
    return next((given_tokenizer(e.tokenizer, "ExportHF.tokenizer") for e in exports if e.tokenizer is not None), None)


def _last_of(trainer: pl.Trainer) -> str:
    """The checkpoint that `fit --ckpt_path last` would go on from."""
    found = trainer._checkpoint_connector._parse_ckpt_path(TrainerFn.FITTING, "last", True, True)
    if found is None:
        raise ConfigError("There is no last checkpoint of this config: name one in `ckpt_path`.")
    return str(found)


def restore(pipeline: Pipeline, checkpoint: Mapping[str, Any], *, source: str) -> PruningPlan:
    """Load a checkpoint's pruning states and the language model's weights.

    Returns:
        The plan that was executed.

    Raises:
        ConfigError: the checkpoint holds an uncut model, or weights that are not those of this model.
    """
    for part in pipeline.parts:
        if part.state_key in checkpoint["callbacks"]:
            part.load_state_dict(checkpoint["callbacks"][part.state_key])
    plan = pipeline.executed
    if plan is None:
        raise ConfigError(f"The checkpoint {source!r} holds an uncut model: name one that was saved after the cut.")
    path, lm = find_causal_lm(pipeline.module)
    prefix = f"{path}." if path else ""
    weights = checkpoint["state_dict"]
    try:
        lm.load_state_dict({n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)})
    except RuntimeError as error:
        raise ConfigError(
            f"The weights in {source!r} do not fit the model: use the configs of the run that wrote them."
        ) from error
    return plan
