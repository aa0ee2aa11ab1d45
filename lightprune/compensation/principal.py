"""The basis in which hidden dimensions are cut: the principal components of what the norms are given.

SliceGPT (arXiv 2401.15024, section 3.3), with one basis for all layers, since a stock class has no adapters between.
Shapes: d hidden dimensions.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightprune.anatomy import Anatomy
from lightprune.anatomy.axes import HIDDEN
from lightprune.errors import ConfigError
from lightprune.integrations.exact_metric import widest
from lightprune.integrations.zero_params import Edited
from lightprune.masks.forward_passes import TokenMask, evaluating
from lightprune.masks.gates import Handle, remove_all
from lightprune.plan import PruningPlan
from lightprune.surgery.rotation import final_norm, norm_weight, obstacle, rotate
from lightprune.surgery.stock_class import is_tied

HELD_SHARE = 8
"""Where the embeddings are the head, one hidden dimension in so many is left as it is."""


def check_rotation(anatomy: Anatomy) -> None:
    """Refuse a model that computes something else in another basis.

    Raises:
        ConfigError: its family has other norms than RMS norms in front of attention and MLP, or other readers.
    """
    reason = obstacle(anatomy)
    if reason is not None:
        raise ConfigError(
            f"LeastSquaresCompensation.rotate is true, and {anatomy.model_type} {reason}, so its hidden dimensions "
            "cannot be rotated: set it to false."
        )


def rotate_to_principal(
    anatomy: Anatomy,
    plan: PruningPlan,
    batches: Sequence[Mapping[str, Tensor]],
    total: Callable[[Tensor], Tensor],
    edited: Edited,
) -> None:
    """Rotate the model so that the hidden dimensions that a plan keeps hold as much of the residual stream as can be.

    Args:
        anatomy: of the uncut model.
        plan: what stays; which hidden dimensions are kept does not matter any more, only how many.
        batches: what the decoder is called with, batch by batch: this rank's own.
        total: sums a tensor over all ranks.
        edited: gives the whole of a parameter, to be changed in place.
    """
    covariance = total(second_moments(anatomy, batches)).cpu().double()
    held: list[int] = []
    kept = plan.kept("hidden", 0)
    if is_tied(anatomy.lm):
        weight = norm_weight(anatomy, final_norm(anatomy)).cpu()
        most = min(len(weight) // HELD_SHARE, len(kept))
        held = (weight - weight.median()).abs().argsort(descending=True)[:most].tolist()
    device = anatomy.lm.device
    rotate(anatomy, principal_basis(covariance, kept, held).to(device, widest(device)), edited)


@torch.no_grad()
def second_moments(anatomy: Anatomy, batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """The sum of x x^T over tokens and over norms, [d, d], of what the norms are given, each x scaled to length 1."""
    device, size = anatomy.lm.device, anatomy.shape.hidden
    moments = torch.zeros(size, size, dtype=widest(device), device=device)
    counted = TokenMask()

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        stream = torch.nn.functional.normalize(inputs[0].float(), dim=-1)
        rows = stream.flatten(0, -2) if counted.mask is None else stream[counted.mask.bool()]
        moments.add_(rows.T @ rows)

    norms = [site.module for site in anatomy.sites() if site.is_norm and site.axes[0] == HIDDEN]
    handles: list[Handle] = [counted.watch(anatomy.decoder)]
    handles += [norm.register_forward_pre_hook(add) for norm in norms]
    try:
        with evaluating(anatomy.lm):
            for batch in batches:
                anatomy.decoder(**{name: value.to(device) for name, value in batch.items()}, use_cache=False)
    finally:
        remove_all(handles)
    return moments


def principal_basis(covariance: Tensor, kept: Sequence[int], held: Sequence[int]) -> Tensor:
    """An orthogonal matrix [d, d] whose columns at `kept` span what is to stay.

    These are, first, the `held` dimensions as they are, and then the principal components of the others, the largest
    first; the smallest stand at the other columns.

    Args:
        covariance: [d, d], float64.
        kept: the columns.
        held: dimensions that are not mixed, at most as many as `kept`.
    """
    size = len(covariance)
    free = [index for index in range(size) if index not in set(held)]
    components = torch.linalg.eigh(covariance[free][:, free]).eigenvectors.flip(1)
    ordered = torch.zeros(size, size, dtype=covariance.dtype)
    ordered[list(held), range(len(held))] = 1
    ordered[free, len(held) :] = components
    columns = [*kept, *(index for index in range(size) if index not in set(kept))]
    basis = torch.empty_like(ordered)
    basis[:, columns] = ordered
    return basis
