"""`check_family`: whether a family's declaration is right, on a small random model; for families from outside too."""

import copy
import random
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lightprune.anatomy import Anatomy, Family, Shape
from lightprune.anatomy.axes import length
from lightprune.export import export_hf
from lightprune.masks.unit_masks import masked
from lightprune.plan import PruningPlan
from lightprune.surgery import cut_model
from lightprune.surgery.stock_class import auto_class

TOLERANCE = 1e-5
"""The largest difference of a logit, relative to the largest logit, in float32."""


def check_family(family: Family, config: PretrainedConfig, *, seed: int = 0) -> list[PruningPlan]:
    """Check the declaration of a family on a model with random weights.

    For each structure that the family declares, and for all of them together: the masked model computes what the cut
    model computes, and the exported directory loads into the stock class with the same logits, cached and not.

    Args:
        family: the declaration; it need not be registered.
        config: of a small model of that family: several layers, heads, groups and channels, and float32.
        seed: of the weights, the tokens and the units that go.

    Returns:
        The plans that were tried. A structure that the stock class cannot lose alone is tried with the others only.

    Raises:
        AssertionError: the declaration does not describe the model; it says where they differ.
        ExportError: the stock class does not hold the cut model.
    """
    with isolate_rng():
        torch.manual_seed(seed)
        lm: PreTrainedModel = auto_class(config).from_config(config).eval()  # type: ignore[no-untyped-call]
        _randomize(lm)
    anatomy = Anatomy(family=family, lm=lm)
    _check_layout(anatomy)
    batch = _tokens(lm, seed)
    tried = []
    for target in _targets(anatomy):
        plan = _random_plan(anatomy, target, random.Random(seed))
        plan.validate(anatomy)
        _check_plan(anatomy, plan, batch)
        tried.append(plan)
    assert tried, f"no smaller shape than {anatomy.shape} is possible for {type(lm).__name__}"
    return tried


@torch.no_grad()
def _randomize(lm: PreTrainedModel) -> None:
    """Draw every weight anew: stock initialization leaves biases at 0 and norms at 1, which hides mistakes."""
    for name, parameter in lm.named_parameters():
        noise = torch.randn_like(parameter)
        is_norm = parameter.ndim == 1 and name.endswith("weight")
        parameter.copy_(1 + 0.3 * noise if is_norm else 0.2 * noise)


def _tokens(lm: PreTrainedModel, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, lm.config.get_text_config().vocab_size, (2, 12), generator=generator)


def _check_layout(anatomy: Anatomy) -> None:
    """Every weight is as long as its axes say."""
    for weight in anatomy.weights():
        for size, axis in zip(weight.parameter.shape, weight.axes, strict=True):
            expected = size if axis is None else length(axis, anatomy.shape)
            assert size == expected, (
                f"{weight.path} has the shape {list(weight.parameter.shape)}, and the declared axes come to {expected} "
                f"where it has {size}"
            )


def _targets(anatomy: Anatomy) -> Iterator[Shape]:
    """About half of each structure that the family declares, alone and all together, as the stock class allows."""
    source, family = anatomy.shape, anatomy.family
    per_group = source.heads_per_group
    groups = max(source.kv_groups // 2, 1)
    halves: list[dict[str, int]] = []
    if source.layers > 1:
        halves.append({"layers": source.layers - 1})
    if "channels" in family.structures:
        halves.append({"channels": max(source.channels // 2, 1)})
    if "hidden" in family.structures:
        halves.append({"hidden": max(source.hidden // 2, 1)})
    if {"heads", "kv_groups"} & family.structures:
        halves.append({"kv_groups": groups, "heads": groups * per_group})
        halves.append({"heads": source.kv_groups * max(per_group // 2, 1)})
    together = {name: count for half in halves[:-1] for name, count in half.items()}
    for half in [*halves, together]:
        shape = replace(source, **half)
        if shape != source and not family.problems(shape, anatomy.config):
            yield shape


def _random_plan(anatomy: Anatomy, target: Shape, rng: random.Random) -> PruningPlan:
    """A plan that arrives at `target`, with random units in every layer."""
    source, layers = anatomy.shape, range(anatomy.shape.layers)

    def some(total: int, count: int) -> list[int]:
        return sorted(rng.sample(range(total), count))

    def heads() -> list[int]:
        groups = some(source.kv_groups, target.kv_groups)
        inside = [some(source.heads_per_group, target.heads_per_group) for _ in groups]
        return [group * source.heads_per_group + head for group, of in zip(groups, inside, strict=True) for head in of]

    return PruningPlan.of(
        anatomy,
        layers=some(source.layers, target.layers),
        heads=None if source.heads == target.heads else [heads() for _ in layers],
        channels=None
        if source.channels == target.channels
        else [some(source.channels, target.channels) for _ in layers],
        hidden=None if source.hidden == target.hidden else some(source.hidden, target.hidden),
    )


def _check_plan(anatomy: Anatomy, plan: PruningPlan, batch: Tensor) -> None:
    """The masked, the cut and the exported model compute the same."""
    with torch.no_grad(), masked(anatomy, plan):
        expected = anatomy.lm(batch, use_cache=False).logits
    lm = copy.deepcopy(anatomy.lm)
    cut_model(Anatomy(family=anatomy.family, lm=lm), plan)
    try:
        with torch.no_grad():
            found = lm(batch, use_cache=False).logits
    except RuntimeError as error:
        raise AssertionError(
            f"the cut model does not run for {plan.shape} ({error}): a weight of these units is not declared"
        ) from error
    apart = ((found - expected).abs().max() / expected.abs().max()).item()
    assert apart <= TOLERANCE, (
        f"the masked and the cut model differ by {apart:.1e} of the largest logit for {plan.shape}: a weight that "
        "belongs to these units is not declared, or declared as something else"
    )
    with tempfile.TemporaryDirectory() as folder:
        export_hf(lm, Path(folder, "pruned"), plan=plan)  # reloads and compares
