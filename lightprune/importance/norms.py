"""Norms over some of their dimensions, by the family's own norm on a prepared input: no row is gathered.

For masks that are drawn anew at every step, where gathering would cost too much. `lightprune.masks.unit_masks`
gathers: its masks stand still, and it takes the very steps that the cut model takes.
"""

from typing import cast

import torch
from torch import Tensor, nn


def norm_over(norm: nn.Module, values: Tensor, kept: Tensor) -> Tensor:
    """What a norm over the kept dimensions alone gives for them, and 0 for the others.

    With k of n dimensions kept and c = sqrt(n / k), the mean square of c x over all n, the others at 0, is that of x
    over the k, and epsilon counts for as much. So the norm of c x is c times what is looked for, its bias excepted. A
    LayerNorm takes x centred on the mean of the k.

    Args:
        norm: an RMS norm or an `nn.LayerNorm` over n dimensions.
        values: its input [..., n].
        kept: 1 where a dimension is kept and 0 elsewhere, at least float32 [n]; where none is, the norm gives 0.
    """
    wide = torch.promote_types(values.dtype, kept.dtype)
    kept = kept.to(wide)
    count = kept.sum().clamp(min=1)
    factor = (len(kept) / count).sqrt()
    prepared = values.to(wide)
    if isinstance(norm, nn.LayerNorm):
        prepared = prepared - (prepared * (kept / count)).sum(-1, keepdim=True)
    prepared = prepared * (kept * factor)
    if isinstance(norm, nn.LayerNorm):  # it takes no other precision than its weight's; RMS norms compute in float32
        prepared = prepared.to(values.dtype)
    # The class's own forward: the instance's may be the one that asks.
    output = cast(Tensor, type(norm).forward(norm, prepared))
    if not isinstance(norm, nn.LayerNorm):
        return (output / factor).to(values.dtype)
    bias = 0 if norm.bias is None else norm.bias
    return (((output - bias) / factor + bias) * kept).to(output.dtype)
