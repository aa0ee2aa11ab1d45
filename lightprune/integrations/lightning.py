"""What lightprune asks of Lightning's trainer and of the user's module."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from transformers import PreTrainedModel

from lightprune.errors import ConfigError


def callbacks_of(trainer: L.Trainer) -> list[Callback]:
    """All callbacks of a trainer, in its order."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def data_of(trainer: L.Trainer) -> Any:
    """The trainer's data module; None where it was given loaders."""
    return getattr(trainer, "datamodule", None)


def logs_now(trainer: L.Trainer) -> bool:
    """Whether `trainer.log_every_n_steps` says to log at the current optimizer step."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(every) and trainer.global_step % every == 0


def find_causal_lm(module: nn.Module) -> tuple[str, PreTrainedModel]:
    """The one Hugging Face causal LM inside `module`, and its dotted path there.

    A module that holds several (a teacher, say) names the one to prune in an attribute `pruned_model`, a dotted path.
    It may also name the text model inside one that sees images: then it is that one.

    Raises:
        ConfigError: there is none, or there are several and none is named.
    """
    found = {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, PreTrainedModel) and child.get_output_embeddings() is not None  # type: ignore[no-untyped-call]
    }
    named: str | None = getattr(module, "pruned_model", None)
    asked = None if named is None else _at(module, named)
    for name, child in found.items():
        if asked is child:
            return str(named), child  # it may have a second name
        if asked is not None and asked is getattr(getattr(child, "model", None), "language_model", None):
            return name, child
    there = " and ".join(sorted(found))
    if named is not None and found:
        raise ConfigError(
            f"{type(module).__name__}.pruned_model is {named!r}, and there is no Hugging Face causal LM of that name: "
            f"set it to {there.replace(' and ', ' or ')}."
        )
    if not found:
        raise ConfigError(_none_found(module))
    if len(found) > 1:
        raise ConfigError(
            f"{type(module).__name__} holds {len(found)} Hugging Face causal LMs, at {there}: name the one to prune in "
            f"the attribute `pruned_model`, such as `pruned_model = {min(found)!r}`."
        )
    return next(iter(found.items()))


def _at(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _none_found(module: nn.Module) -> str:
    """Why a module holds no causal LM, and what would help."""
    headless = {name: child for name, child in module.named_modules() if isinstance(child, PreTrainedModel)}
    holds_none = f"{type(module).__name__} holds no Hugging Face causal LM"
    if headless:
        name, child = next(iter(headless.items()))
        return (
            f"{holds_none}, only a {type(child).__name__} without a language model's head at {name!r}: load it as "
            "`AutoModelForCausalLM`, call its `base_model` where only hidden states are needed, and give those to the "
            "head of your own."
        )
    return (
        f"{holds_none} in its attributes: build one with `AutoModelForCausalLM` in `__init__`, `setup` or "
        "`configure_model`."
    )


def check_causal_lm(lm: object, wanted_by: str) -> None:
    """Refuse what is no Hugging Face model.

    Raises:
        ConfigError: it names what needs one.
    """
    if not isinstance(lm, PreTrainedModel):
        raise ConfigError(
            f"{wanted_by} takes a Hugging Face causal LM, and `lm` is of type {type(lm).__name__}: give it the "
            "PreTrainedModel itself."
        )


def shadow_method(owner: object, name: str, replacement: Callable[..., object]) -> Callable[[], None]:
    """Shadow a method on one instance; `replacement` gets the original first. Returns what takes the shadow away."""
    original = getattr(owner, name)
    before = vars(owner).get(name)

    def shadow(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    def restore() -> None:
        if vars(owner).get(name) is not shadow:  # restored already
            return
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    setattr(owner, name, shadow)
    return restore


def is_training_pass(trainer: L.Trainer) -> bool:
    """Whether a forward pass now is one that trains: not validation's, nor one that samples or scores on the side.

    A module's own `training` flag says nothing of that: `from_pretrained` leaves it off, and Lightning as it is.
    """
    return trainer.training and torch.is_grad_enabled()


def log_metrics(trainer: L.Trainer, metrics: Mapping[str, float]) -> None:
    """Write metrics to the trainer's loggers at the current optimizer step."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step)


def run_validation(trainer: L.Trainer) -> dict[str, float]:
    """Run the validation loop from inside `fit`, as the training loop itself does, and return what it logged.

    Without validation data, without a `validation_step`, and with `limit_val_batches=0` it does nothing and returns {}.
    It leaves no trace in the global random generators: whether it ran does not change the training that follows.
    """
    if not has_validation(trainer):
        return {}
    # Lightning 2.6.6: `_logger_connector._first_loop_iter` says whether results are to be reset. Without it what
    # training logs in the step of a validation at the cut would be lost.
    connector = trainer._logger_connector
    first_loop_iter = connector._first_loop_iter
    with isolate_rng(), _validating(trainer):
        outputs = trainer.fit_loop.epoch_loop.val_loop.run()
    connector._first_loop_iter = first_loop_iter
    return {name: float(value) for output in outputs for name, value in output.items()}


def logged_by_validation(trainer: L.Trainer) -> dict[str, float]:
    """What a validation that ends has logged; `trainer.callback_metrics` mixes it with what training logs."""
    # Lightning 2.6.6: `_logger_connector.metrics`. Without it a model card would show metrics of training as
    # validation's.
    logged = trainer._logger_connector.metrics["log"]
    return {name: float(value) for name, value in logged.items()}


def has_validation(trainer: L.Trainer) -> bool:
    """Whether a validation inside `fit` would see at least one batch; asks for the loaders if nobody has yet."""
    if not trainer.enable_validation:
        return False
    loop = trainer.fit_loop.epoch_loop.val_loop
    with _validating(trainer):
        loop.setup_data()
    return not loop.skip


@contextmanager
def _validating(trainer: L.Trainer) -> Iterator[None]:
    """What the training loop sets for its validation, so that Lightning takes the right loop for the active one."""
    trainer.validating = True
    yield
    trainer.training = True


def validation_due(trainer: L.Trainer) -> bool:
    """Whether Lightning validates as soon as the callbacks are done with this batch.

    A run that resumes from a checkpoint saved at this moment passes that validation over (2.6:
    `_TrainingEpochLoop.advance`).
    """
    loop = trainer.fit_loop
    # Lightning 2.6.6: `_data_fetcher` and `_should_check_val_fx` decide it. Without them a resume could lose a
    # validation.
    return bool(loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher))
