"""Expected parameters: exact where probabilities are 0 or 1, and the mean of what random plans leave."""

import random

import pytest
import torch
from torch import Tensor

from lightprune.anatomy import Anatomy, Structure, anatomy_of
from lightprune.plan import PruningPlan
from lightprune.surgery import expected_parameters, resulting_parameters
from tests.families import FAMILIES, combinations_of, random_plan, tiny_lm


def certain(plan: PruningPlan) -> dict[Structure, Tensor]:
    """1 for what a plan keeps."""
    shape = plan.source
    found: dict[Structure, Tensor] = {"layers": torch.zeros(shape.layers), "hidden": torch.zeros(shape.hidden)}
    found["layers"][list(plan.kept_layers)] = 1
    found["hidden"][list(plan.kept("hidden", 0))] = 1
    for unit in ("heads", "kv_groups", "channels"):
        rows = torch.zeros(shape.layers, shape.count(unit))
        for layer in range(shape.layers):
            rows[layer, list(plan.kept(unit, layer))] = 1
        found[unit] = rows
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_certain_is_counted(name: str) -> None:
    lm = tiny_lm(name)
    anatomy = anatomy_of(lm)
    assert expected_parameters(anatomy, {}) == anatomy.num_parameters
    for seed in range(3):
        plan = random_plan(anatomy, combinations_of(lm)[-1 - seed], random.Random(seed))
        assert expected_parameters(anatomy, certain(plan)) == resulting_parameters(anatomy, plan)


def counted(anatomy: Anatomy, is_open: dict[Structure, Tensor]) -> float:
    """Every entry of every weight of the tied Llama by hand, 1 where all that it belongs to is open."""
    hidden, vocabulary = is_open["hidden"].sum(), anatomy.config.vocab_size
    total = vocabulary * hidden + hidden  # embedding and head are one; the final norm
    for layer, open_layer in enumerate(is_open["layers"]):
        heads, groups = 8 * is_open["heads"][layer].sum(), 8 * is_open["kv_groups"][layer].sum()
        channels = is_open["channels"][layer].sum()
        attention = 2 * heads * hidden + 2 * groups * hidden + heads + 2 * groups + hidden  # with biases
        mlp = 3 * channels * hidden + 2 * channels + hidden
        total = total + open_layer * (attention + mlp + 2 * hidden)
    return float(total)


def test_what_is_likely_is_the_mean_over_draws() -> None:
    anatomy, generator = anatomy_of(tiny_lm("llama_tied", num_layers=3)), torch.Generator().manual_seed(0)
    layers, groups, channels, hidden = (
        0.5 + 0.5 * torch.rand(size, generator=generator) for size in ((3,), (3, 2), (3, 48), (32,))
    )
    own = 0.5 + 0.5 * torch.rand(3, 4, generator=generator)
    likely: dict[Structure, Tensor] = {
        "layers": layers,
        "heads": own * groups.repeat_interleave(2, -1),
        "kv_groups": groups,
        "channels": channels,
        "hidden": hidden,
    }
    counts = []
    for _ in range(2000):
        drawn_groups = torch.bernoulli(groups, generator=generator)
        counts.append(
            counted(
                anatomy,
                {
                    "layers": torch.bernoulli(layers, generator=generator),
                    "heads": torch.bernoulli(own, generator=generator) * drawn_groups.repeat_interleave(2, -1),
                    "kv_groups": drawn_groups,
                    "channels": torch.bernoulli(channels, generator=generator),
                    "hidden": torch.bernoulli(hidden, generator=generator),
                },
            )
        )
    seen = torch.tensor(counts, dtype=torch.float64)
    error = 4 * seen.std().item() / len(counts) ** 0.5
    assert error < 0.03 * seen.mean().item()
    assert expected_parameters(anatomy, likely) == pytest.approx(seen.mean().item(), abs=error)
