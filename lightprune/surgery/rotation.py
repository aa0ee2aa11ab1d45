"""One rotation of the residual stream: the model computes what it did, in another basis of its hidden dimensions.

RMS norms commute with a rotation once their weights are folded into the projections that read them (SliceGPT, arXiv
2401.15024, section 3.2). So every reader W becomes W diag(g) Q, every writer Q^T W, and the embeddings E Q.

Shapes: d hidden dimensions.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from lightprune.anatomy import Anatomy
from lightprune.anatomy.axes import CHANNELS, HIDDEN
from lightprune.anatomy.base import Site
from lightprune.errors import ConfigError
from lightprune.integrations.zero_params import gathered

Edited = Callable[[nn.Parameter], AbstractContextManager[Tensor]]


def check_rotation(anatomy: Anatomy) -> None:
    """Refuse a model that computes something else in another basis.

    Raises:
        ConfigError: its family has other norms than RMS norms in front of attention and MLP, or other readers.
    """
    reason = _obstacle(anatomy)
    if reason is not None:
        raise ConfigError(
            f"LeastSquaresCompensation.rotate is true, and {anatomy.model_type} {reason}, so its hidden dimensions "
            "cannot be rotated: set it to false."
        )


def _obstacle(anatomy: Anatomy) -> str | None:
    sites = [site for site in anatomy.sites() if HIDDEN in site.axes]
    if not sites:
        return "keeps its hidden dimensions"
    norms = [site for site in sites if site.is_norm]
    if any("RMSNorm" not in type(site.module).__name__ for site in norms):
        return "has norms that are no RMS norms"
    writers = {id(writer.module) for writer in anatomy.writers()}
    if any(id(site.module) in writers for site in norms):
        return "has norms behind its projections"
    if any(sum(site.layer == index for site in norms) != 2 for index in range(anatomy.num_layers)):
        return "has not one norm in front of attention and one in front of the MLP"
    stem = [site for site in sites if site.layer is None and not site.is_norm]
    if any(site.module is not anatomy.head and not isinstance(site.module, nn.Embedding) for site in stem):
        return "has more than token embeddings and a head outside its layers"
    return None


def is_tied(anatomy: Anatomy) -> bool:
    """Whether the head is the embedding matrix: then the final norm's weights can be folded into neither."""
    embeddings = anatomy.lm.get_input_embeddings()
    return getattr(anatomy.head, "weight", None) is getattr(embeddings, "weight", None)


def final_norm(anatomy: Anatomy) -> Site:
    """The norm in front of the head."""
    (site,) = [site for site in anatomy.sites() if site.is_norm and site.layer is None]
    return site


@torch.no_grad()
def norm_weight(anatomy: Anatomy, site: Site) -> Tensor:
    """What a norm over hidden dimensions multiplies by, [d], float64."""
    (weight,) = [weight for weight in site.weights() if weight.name == "weight"]
    return gathered(weight.parameter).double() + anatomy.family.norm_offset


@torch.no_grad()
def rotate(anatomy: Anatomy, rotation: Tensor, edited: Edited) -> None:
    """Write the model in the basis that the columns of `rotation` are, in place; its outputs stay what they were.

    Where the embeddings are the head, that holds if the final norm's weights are the same in all dimensions that are
    mixed; else these weights become the diagonal of Q^T diag(g) Q, the nearest that the model can have.

    Args:
        anatomy: of a model that `check_rotation` allows.
        rotation: Q, orthogonal, [d, d], float64.
        edited: gives the whole of a parameter, to be changed in place.
    """
    tied, seen = is_tied(anatomy), set[int]()
    scales: dict[int, Tensor] = {}  # of readers, by their identity, what the norm in front of them multiplies by
    for norm, readers in _reading(anatomy):
        for reader in readers:
            scales[id(reader.module)] = norm_weight(anatomy, norm)
    if not tied:
        scales[id(anatomy.head)] = norm_weight(anatomy, final_norm(anatomy))
    for site in anatomy.sites():
        if site.is_norm:
            continue
        for weight in site.weights():
            if HIDDEN in weight.axes and id(weight.parameter) not in seen:
                seen.add(id(weight.parameter))
                _turn(weight.parameter, weight.axes.index(HIDDEN), scales.get(id(site.module)), rotation, edited)
    for site in anatomy.sites():
        if site.is_norm and site.axes[0] == HIDDEN:
            kept = tied and site.layer is None
            turned = (rotation.T.square() @ norm_weight(anatomy, site).to(rotation)) if kept else None
            for weight in site.weights():
                with edited(weight.parameter) as values:
                    values.copy_(torch.ones_like(values) if turned is None else turned.to(values))
                    values -= anatomy.family.norm_offset


def _reading(anatomy: Anatomy) -> Iterator[tuple[Site, list[Site]]]:
    """Each norm inside the layers with the projections that read what it gives: attention's, then the MLP's."""
    sites = [site for site in anatomy.sites() if site.layer is not None]
    for index in range(anatomy.num_layers):
        of_layer = [site for site in sites if site.layer == index]
        norms = [site for site in of_layer if site.is_norm and site.axes[0] == HIDDEN]
        readers = [site for site in of_layer if site.reads(HIDDEN)]
        of_mlp = [site for site in readers if site.axes[0] == CHANNELS or _is_gated(site)]
        yield norms[0], [site for site in readers if site not in of_mlp]
        yield norms[1], of_mlp


def _is_gated(site: Site) -> bool:
    """Whether it is a gate and an up projection in one."""
    return site.axes[0] is not None and {run.unit for run in site.axes[0]} == {"channels"}


def _turn(parameter: nn.Parameter, dimension: int, scale: Tensor | None, rotation: Tensor, edited: Edited) -> None:
    with edited(parameter) as values:
        last = values.movedim(dimension, -1).to(rotation.dtype)
        if scale is not None:
            last = last * scale.to(rotation)
        values.copy_((last @ rotation.to(values.device)).movedim(-1, dimension).to(values.dtype))
