"""What the verbs `plan`, `export` and `generate` do."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from rich.console import Console

from lightprune.cli.forecast import forecast, shown
from lightprune.costs import Workload
from lightprune.data import TextDataModule
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
from lightprune.export.stock_check import check_stock
from lightprune.export.tokenizer import Tokenizer
from lightprune.integrations.checkpoints import found_checkpoint
from lightprune.integrations.lightning import callbacks_of, find_causal_lm
from lightprune.pipeline import Part, Pipeline
from lightprune.plan import PruningPlan

_SHOWN, _WIDTH = 3, 100  # documents of each domain that `generate` shows, and characters of each


def print_plan(trainer: pl.Trainer, model: pl.LightningModule, work: Workload, output: str | None) -> None:
    """Print what a config would cut, when, and what that costs: see `PruningTrainer.plan`."""
    with _pipeline(trainer, model, stage="fit") as pipeline:
        document = forecast(pipeline, work)
    Console().print(shown(document))
    if output is not None:
        Path(output).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def export(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    ckpt_path: str,
    output: str,
    datamodule: pl.LightningDataModule | None,
    overwrite: bool,
    weights_only: bool | None,
    tokenizer: str | None,
) -> Path:
    """Write the model of a checkpoint as a Hugging Face directory: see `PruningTrainer.export`."""
    if ckpt_path == "last":
        ckpt_path = _last_of(trainer)
    check_target(output, overwrite=overwrite, key="output")
    given = given_tokenizer(tokenizer, "tokenizer") or _configured_tokenizer(trainer)
    with _pipeline(trainer, model, stage="validate") as pipeline:
        # The pipeline gives the model its shape; states and weights are for us to load.
        checkpoint = trainer.strategy.load_checkpoint(ckpt_path, weights_only=weights_only)
        plan = restore(pipeline, checkpoint, source=ckpt_path)
        pipeline.finish()
        card = card_of(trainer)
        card["data"] = {"optimizer steps": checkpoint["global_step"]}
        found = given or tokenizer_of(trainer, model, datamodule)
        if found is None:
            warn_of_none("tokenizer")
        check_stock(pipeline.lm, instead="take the weights from the checkpoint itself")
        return export_hf(pipeline.lm, output, tokenizer=found, plan=plan, card=card, overwrite=overwrite)


def generate(model: pl.LightningModule, datamodule: pl.LightningDataModule | None, output: str | None) -> None:
    """Let a model write the text of the generated domains: see `PruningTrainer.generate`."""
    if not isinstance(datamodule, TextDataModule):
        raise ConfigError(f"`generate` writes the text of a TextDataModule, and data is {type(datamodule).__name__}.")
    written = datamodule.generate(model)
    decode = datamodule.tokenizer.decode
    with nullcontext() if output is None else Path(output).open("w", encoding="utf-8") as file:
        for domain, cache in written.items():
            starts = [0, *cache.ends.tolist()]
            print(f"{domain}: {len(cache.tokens):,} tokens in {len(cache.ends):,} documents at {cache.directory}")
            for number, (begin, end) in enumerate(pairwise(starts)):
                text = decode(cache.tokens[begin:end].tolist(), skip_special_tokens=True)
                if number < _SHOWN:
                    print(f"  {' '.join(str(text).split())[:_WIDTH]}")
                if file is not None:
                    file.write(json.dumps({"domain": domain, "text": text}, ensure_ascii=False) + "\n")


@contextmanager
def _pipeline(trainer: pl.Trainer, model: pl.LightningModule, *, stage: str) -> Iterator[Pipeline]:
    """The pipeline of the trainer's callbacks around the built model, as `fit` would make it."""
    trainer.strategy.connect(model)
    for callback in callbacks_of(trainer):
        if isinstance(callback, Part):
            callback.setup(trainer, model, stage)
    pipeline = Pipeline.of(trainer)
    if pipeline is None or pipeline.cut is None:
        raise ConfigError("Nothing is to be cut: add a selector and a StructuredCut to trainer.callbacks.")
    try:
        model.configure_model()
        yield pipeline
    finally:
        pipeline.close()


def _configured_tokenizer(trainer: pl.Trainer) -> Tokenizer | None:
    """What the config's `ExportHF` names, if it has one and that names any."""
    exports = [c for c in callbacks_of(trainer) if isinstance(c, ExportHF)]
    return next((given_tokenizer(e.tokenizer, "ExportHF.tokenizer") for e in exports if e.tokenizer is not None), None)


def _last_of(trainer: pl.Trainer) -> str:
    """The checkpoint that `fit --ckpt_path last` would resume from."""
    found = found_checkpoint(trainer, "last")
    if found is None:
        raise ConfigError("There is no last checkpoint of this config: name one in `ckpt_path`.")
    return found


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
