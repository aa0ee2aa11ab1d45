"""One rotation of the residual stream: the model computes what it did, in another basis of its hidden dimensions.

RMS norms commute with a rotation once their weights are folded into the projections that read them (SliceGPT, arXiv
2401.15024, section 3.2). So every reader W becomes W diag(g) Q, every writer Q^T W, and the embeddings E Q.

Shapes: d hidden dimensions.
"""

import torch
from torch import Tensor, nn

from lightprune.anatomy import Anatomy
from lightprune.anatomy.axes import HIDDEN, of_attention
from lightprune.anatomy.base import Site
from lightprune.integrations.exact_metric import widest
from lightprune.integrations.zero_params import Edited, gathered
from lightprune.surgery.stock_class import is_tied


def obstacle(anatomy: Anatomy) -> str | None:
    """Why the model would compute something else in another basis, in words; None if it can be rotated."""
    sites = [site for site in anatomy.sites() if HIDDEN in site.axes]
    if not sites:
        return "keeps its hidden dimensions"
    norms = [site for site in sites if site.is_norm]
    if any("RMSNorm" not in type(site.module).__name__ for site in norms):
        return "has norms that are no RMS norms"
    writers = {writer.module for writer in anatomy.writers()}
    if any(site.module in writers for site in norms):
        return "has norms behind its projections"
    if any(sum(site.layer == index for site in norms) != 2 for index in range(anatomy.num_layers)):
        return "has not one norm in front of attention and one in front of the MLP"
    stem = [site for site in sites if site.layer is None and not site.is_norm]
    if any(site.module is not anatomy.head and not isinstance(site.module, nn.Embedding) for site in stem):
        return "has more than token embeddings and a head outside its layers"
    return None


def final_norm(anatomy: Anatomy) -> Site:
    """The norm in front of the head."""
    (site,) = [site for site in anatomy.sites() if site.is_norm and site.layer is None]
    return site


@torch.no_grad()
def norm_weight(anatomy: Anatomy, site: Site) -> Tensor:
    """What a norm over hidden dimensions multiplies by, [d], in the widest floating-point type that its device has."""
    (weight,) = [weight for weight in site.weights() if weight.name == "weight"]
    whole = gathered(weight.parameter)
    return whole.to(widest(whole.device)) + anatomy.family.norm_offset


@torch.no_grad()
def rotate(anatomy: Anatomy, rotation: Tensor, edited: Edited) -> None:
    """Write the model in the basis that the columns of `rotation` are, in place; its outputs stay what they were.

    Where the embeddings are the head, that holds if the final norm's weights are the same in all dimensions that are
    mixed; else these weights become the diagonal of Q^T diag(g) Q, the nearest that the model can have.

    Args:
        anatomy: of a model that has no `obstacle`.
        rotation: Q, orthogonal, [d, d], on the model's device.
        edited: gives the whole of a parameter, to be changed in place.
    """
    scales = _scales(anatomy)
    turned: set[nn.Parameter] = set()  # a tied one comes twice
    for site in anatomy.sites():
        for weight in site.weights():
            if HIDDEN not in weight.axes or weight.parameter in turned:
                continue
            turned.add(weight.parameter)
            if site.is_norm:
                _clear_norm(anatomy, site, weight.parameter, rotation, edited)
            else:
                _turn(weight.parameter, weight.axes.index(HIDDEN), scales.get(site.module), rotation, edited)


def _scales(anatomy: Anatomy) -> dict[nn.Module, Tensor]:
    """For each module that reads what a norm gives, the weights of that norm, to be folded into it."""
    norms: dict[int, list[Tensor]] = {index: [] for index in range(anatomy.num_layers)}
    readers: list[Site] = []
    for site in anatomy.sites():
        if site.layer is None:
            continue
        if site.is_norm and site.axes[0] == HIDDEN:
            norms[site.layer].append(norm_weight(anatomy, site))
        elif site.reads(HIDDEN):
            readers.append(site)
    scales = {}
    for reader in readers:
        assert reader.layer is not None
        of_heads, of_channels = norms[reader.layer]
        scales[reader.module] = of_heads if of_attention(reader.axes[0] or ()) else of_channels
    if not is_tied(anatomy.lm):
        scales[anatomy.head] = norm_weight(anatomy, final_norm(anatomy))
    return scales


def _clear_norm(anatomy: Anatomy, site: Site, parameter: nn.Parameter, rotation: Tensor, edited: Edited) -> None:
    """Let a norm multiply by 1, since its readers do what it did; or where the head cannot, by what comes nearest."""
    weight = norm_weight(anatomy, site)
    in_head = site.layer is None and is_tied(anatomy.lm)
    new = rotation.T.square() @ weight.to(rotation) if in_head else torch.ones_like(weight)
    with edited(parameter) as values:
        values.copy_(new - anatomy.family.norm_offset)


def _turn(parameter: nn.Parameter, dimension: int, scale: Tensor | None, rotation: Tensor, edited: Edited) -> None:
    with edited(parameter) as values:
        last = values.movedim(dimension, -1).to(rotation)
        if scale is not None:
            last = last * scale.to(rotation)
        values.copy_((last @ rotation).movedim(-1, dimension))
