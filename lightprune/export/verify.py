"""The written directory against the model in memory: weights exactly, logits up to rounding, with and without cache."""

from functools import reduce
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightprune.errors import ExportError
from lightprune.export.convert import Outgoing
from lightprune.export.probe import attention_that_runs, logits_apart, not_finite
from lightprune.hub import loading_problems
from lightprune.integrations.dtypes import in_dtype, main_dtype
from lightprune.integrations.models import attention_of
from lightprune.surgery.stock_class import auto_class, is_tied


def verify_export(path: Path, lm: PreTrainedModel, out: Outgoing) -> None:
    """Reload a directory as a user would, and compare it with the model in memory, which is in eval mode.

    It is reloaded on the CPU. Once every weight there is known to be that in memory, the logits are computed with the
    latter, so that the training device holds no second model.

    Args:
        path: the directory.
        lm: the model in memory, its weights in the dtypes that were written.
        out: what was written for it.

    Raises:
        ExportError: weights are not finite; weights, ties or logits differ, on padded sequences or not, cached or not.
    """
    broken = not_finite(out.model)
    if broken is not None:
        raise ExportError(f"training has broken the model: {broken}")
    dtypes = {p.dtype for p in out.model.parameters() if p.is_floating_point()}
    with attention_that_runs(lm):
        loaded: object = auto_class(lm.config).from_pretrained(
            path,
            # Weights of several dtypes are exact in the widest alone: "auto" rounds all to that of the config.
            dtype="auto" if len(dtypes) < 2 else reduce(torch.promote_types, dtypes),
            attn_implementation=attention_of(lm.config),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        reloaded, report = cast(tuple[PreTrainedModel, dict[str, object]], loaded)
        differences = loading_problems(report) or _differences(reloaded, lm, out)
    if differences:
        raise ExportError(f"the reloaded model differs: {', '.join(differences)}")


def _differences(reloaded: PreTrainedModel, lm: PreTrainedModel, out: Outgoing) -> list[str]:
    written, read = out.model.state_dict(), reloaded.state_dict()
    differing = [n for n in written.keys() | read.keys() if not _same(written.get(n), read.get(n))]
    if differing:
        return [f"{len(differing)} weights (such as {min(differing)})"]
    if is_tied(reloaded) != is_tied(lm):
        return [f"its embeddings are {'' if is_tied(reloaded) else 'not '}tied"]
    del read
    dtype = main_dtype(lm)
    with in_dtype(lm, dtype):
        if getattr(reloaded, "hf_quantizer", None) is None:  # else a weight is more than its tensor
            weights = {n: t.to(dtype) if t.is_floating_point() else t for n, t in written.items()}
            reloaded.load_state_dict(weights, assign=True)
        reloaded.to(lm.device)  # type: ignore[arg-type]
        _round_buffers(reloaded, lm)
        return logits_apart(reloaded, lm, exact=out.exact)


def _round_buffers(reloaded: PreTrainedModel, lm: PreTrainedModel) -> None:
    """Bring the rotary frequencies and the like to the dtype that training gave them.

    `bf16-true` rounds them, a reloaded model computes them anew in float32, and the logits show it. Not the scale of an
    embedding: where that differs, the weights make up for it.
    """
    ours = dict(lm.named_buffers())
    for name, buffer in reloaded.named_buffers():
        if name in ours and not name.endswith("embed_scale"):
            buffer.data = buffer.to(ours[name].dtype)


def _same(written: Tensor | None, read: Tensor | None) -> bool:
    """Whether a weight is what was written, in a dtype that holds all of its digits; compared where it was written."""
    if written is None or read is None or torch.promote_types(written.dtype, read.dtype) != read.dtype:
        return False
    return torch.equal(read.to(written.device), written.to(read.dtype))
