"""`PruningTrainer`: a Trainer with the verbs `plan` and `export`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console

from lightprune.cli.forecast import forecast
from lightprune.cli.precision import PrecisionSetting
from lightprune.errors import ConfigError
from lightprune.export import card_of, check_target, export_hf, tokenizer_of
from lightprune.host import find_causal_lm
from lightprune.pipeline import Part, Pipeline
from lightprune.plan import PruningPlan


class PruningTrainer(pl.Trainer):
    """A Trainer with the two verbs that need a model and no training.

    Args:
        precision: as in `Trainer`, or "auto", in whose place the command line sets what is fast on the devices.
    """

    def __init__(self, *args: Any, precision: PrecisionSetting = None, **kwargs: Any) -> None:
        super().__init__(*args, precision=precision, **kwargs)  # type: ignore[arg-type]

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
    ) -> None:
        """Write the model of a checkpoint as a Hugging Face directory.

        Args:
            model: the module that was trained.
            ckpt_path: a checkpoint of a run with the same config; "last" is the newest of its `ModelCheckpoint`.
            output: the directory to write.
            datamodule: not used.
            overwrite: replace `output` if it exists.
            weights_only: as in `fit`.
        """
        if ckpt_path == "last":
            ckpt_path = _last_of(self)
        check_target(output, overwrite=overwrite, key="output")
        with self._pipeline(model, stage="validate") as pipeline:
            # The pipeline gives the model its shape; states and weights are for us to load.
            checkpoint = self.strategy.load_checkpoint(ckpt_path, weights_only=weights_only)
            plan = restore(pipeline, checkpoint, source=ckpt_path)
            pipeline.finish()
            card = card_of(self)
            card["data"] = {"optimizer steps": checkpoint["global_step"]}
            tokenizer = tokenizer_of(self, model)
            target = export_hf(pipeline.lm, output, tokenizer=tokenizer, plan=plan, card=card, overwrite=overwrite)
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
