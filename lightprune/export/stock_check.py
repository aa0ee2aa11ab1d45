"""Whether a stock class holds all of a model, and computes what it computes: found out before anything trains."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from transformers import PreTrainedModel

from lightprune.errors import ConfigError
from lightprune.export.probe import attention_that_runs, logits_apart, not_finite, plain_outputs, probe, probe_logits
from lightprune.integrations.dtypes import in_dtype, main_dtype
from lightprune.integrations.models import compute_buffers
from lightprune.integrations.torch_modules import own_buffers, unsaved_buffers
from lightprune.integrations.zero_params import is_partitioned, whole_shape
from lightprune.masks.forward_passes import evaluating
from lightprune.surgery.stock_class import is_tied, parameter_difference, state_tie, stock_form

_EXTRA_STATE = "_extra_state"  # the ending that PyTorch gives to what `get_extra_state` returns


def check_stock(lm: PreTrainedModel, *, adapters_expected: bool = False, instead: str = "leave ExportHF out") -> None:
    """Refuse a model that no stock class can hold as it is; only warn of adapters, which may still be merged.

    Compares the names and shapes of parameters and buffers and, where the weights are whole on this device, the logits
    of a few tokens: what a `forward` of the model's own, a hook or a changed attribute does, no export carries along.
    The stock class is built on the `meta` device and gets the model's own tensors, so that nothing is copied. Quantized
    models are passed over: their classes are built with the quantizer alone.

    Args:
        lm: the model, without the gates of selectors.
        adapters_expected: whether somebody is known to merge the adapters; then nothing is said of them.
        instead: what to do without an export, for the errors.

    Raises:
        ConfigError: the stock class has other parameters or buffers, or computes something else; or the model computes
            nothing finite.
    """
    if getattr(lm, "hf_quantizer", None) is not None:
        return
    with attention_that_runs(lm), plain_outputs(lm):
        stock = _stock_of(lm)
        if stock is None:  # a class that cannot be built without its weights: the export itself will judge
            return
        difference = parameter_difference({n: whole_shape(p) for n, p in lm.named_parameters()}, stock)
        if any(hasattr(module, "base_layer") for module in lm.modules()):
            if difference is not None and not adapters_expected:
                rank_zero_warn(
                    f"The model has adapters: unless they are merged by then, it cannot be exported ({difference})."
                )
            return
        if difference is not None:
            raise ConfigError(
                f"The model cannot be exported: {difference}; {instead}, or train a model that adds nothing to its "
                "class."
            )
        _check_buffers(lm, stock, instead)
        if not any(is_partitioned(p) or p.is_meta for p in lm.parameters()):
            with evaluating(lm), in_dtype(lm, main_dtype(lm)), _buffers_kept(lm), isolate_rng():
                _check_logits(lm, stock_with_weights(stock, lm), instead)


def _stock_of(lm: PreTrainedModel) -> PreTrainedModel | None:
    """The stock class for a model on the `meta` device; None where it cannot be built."""
    config = copy.deepcopy(lm.config)
    state_tie(config, is_tied(lm))
    form = stock_form(lm, config)
    try:
        return form.build()
    except Exception:
        return None


def stock_with_weights(stock: PreTrainedModel, lm: PreTrainedModel) -> PreTrainedModel:
    """A stock class from the `meta` device, in eval mode, with a model's own tensors.

    Buffers that are not saved are computed from the config, as `from_pretrained` does, and brought to the dtype that
    training gave them: `bf16-true` rounds rotary frequencies. Gemma's scale of the embedding is the model's own: where
    a cut has made it another than the config's, the export folds it into the weights.
    """
    ours = dict(lm.named_buffers())
    for prefix, module in stock.named_modules():
        buffers: dict[str, Any] = own_buffers(module)
        names = unsaved_buffers(module)
        for name in names:
            buffers[name] = torch.empty_like(buffers[name], device="cpu")
        if names:
            compute_buffers(stock, module)
        for name in names:
            own = ours.get(f"{prefix}.{name}" if prefix else name)
            if own is not None:
                buffers[name] = own.clone() if name.endswith("embed_scale") else buffers[name].to(own.dtype)
    stock.load_state_dict(lm.state_dict(), assign=True)
    stock.to(lm.device)  # type: ignore[arg-type]
    stock.eval()  # type: ignore[no-untyped-call]
    return stock


def _check_buffers(lm: PreTrainedModel, stock: PreTrainedModel, instead: str) -> None:
    ours, theirs = _saved_buffers(lm), _saved_buffers(stock)
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if not differing:
        return
    first = differing[0]
    if first.endswith(_EXTRA_STATE):
        what, advice = f"{first}, an extra state,", "train with modules that have none"
    elif first in ours:
        what = f"{first}, a buffer that is saved,"
        advice = "register it with `persistent=False`, or keep it in the LightningModule"
    else:
        what, advice = f"{first}, a buffer that the model lacks,", "train the model as its class builds it"
    raise ConfigError(
        f"The model cannot be exported: {what} is not as in a stock {type(stock).__name__} (entries that differ: "
        f"{len(differing)}); {advice}, or {instead}."
    )


def _saved_buffers(lm: PreTrainedModel) -> Mapping[str, torch.Size | type]:
    """The shapes of what a state dict holds beside parameters, by name; an extra state may be of any type."""
    parameters = {name for name, _ in lm.named_parameters(remove_duplicate=False)}
    state = {name: value for name, value in lm.state_dict().items() if name not in parameters}
    return {name: value.shape if isinstance(value, Tensor) else type(value) for name, value in state.items()}


def _check_logits(lm: PreTrainedModel, stock: PreTrainedModel, instead: str) -> None:
    kind = type(stock).__name__
    try:
        differences = logits_apart(stock, lm)
    except Exception as error:
        if not _runs(stock):  # not here: the export itself will judge
            return
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".: ")
        raise ConfigError(
            f"The model cannot be exported: it fails on plain tokens, where a stock {kind} with its weights does not "
            f"({reason}); {instead}, or train what the stock class computes."
        ) from error
    if not differences:
        return
    broken = not_finite(lm)
    if broken is not None:
        raise ConfigError(f"The model is broken: {broken}; load sound weights, or an earlier checkpoint.")
    if not probe_logits(lm, probe(lm, padding=0)).isfinite().all():
        raise ConfigError(
            f"The model's logits are not finite in {lm.dtype}: load sound weights, or train in a dtype with a wider "
            "range."
        )
    raise ConfigError(
        f"The model cannot be exported: a stock {kind} with its weights computes something else ({differences[0]}), so "
        f"a `forward` of its own, a hook or a changed attribute would be lost; {instead}, or train what the stock "
        "class computes."
    )


def _runs(stock: PreTrainedModel) -> bool:
    try:
        probe_logits(stock, probe(stock, padding=0))
    except Exception:
        return False
    return True


@contextmanager
def _buffers_kept(lm: PreTrainedModel) -> Iterator[None]:
    """Restore the buffers afterwards: a custom `forward` may count in them."""
    owners = [(module, name, buffer) for module in lm.modules() for name, buffer in own_buffers(module).items()]
    kept = [(*owner, None if owner[2] is None else owner[2].clone()) for owner in owners]
    try:
        yield
    finally:
        for module, name, buffer, value in kept:
            own_buffers(module)[name] = buffer
            if buffer is not None and value is not None:
                buffer.copy_(value)
