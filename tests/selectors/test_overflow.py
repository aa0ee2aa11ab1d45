"""A batch whose activations overflow, as in float16, is left out of what selectors see: it decides nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightprune as lp
from lightprune.selectors import Selector
from tests.families import tiny_lm
from tests.training import Batch, Batches, Plain, batches, fit

pytestmark = pytest.mark.filterwarnings("ignore:.*MLP channels are no multiple of 64")

WINDOW = 3
SELECTORS: dict[str, Any] = {
    "influence": lambda stop: lp.BlockInfluenceSelector(drop=2, stop=stop),
    "gates": lambda stop: lp.LayerGateSelector(drop=2, rounds=1, steps_per_round=stop),
    "mean": lambda stop: lp.ActivationUnitSelector(channels=32, hidden=16, kv_groups=1, metric="mean", stop=stop),
    "l2": lambda stop: lp.ActivationUnitSelector(channels=32, hidden=16, kv_groups=1, stop=stop),
    "fluctuation": lambda stop: lp.ActivationUnitSelector(channels=32, metric="fluctuation", stop=stop),
    "taylor": lambda stop: lp.TaylorUnitSelector(channels=32, hidden=16, kv_groups=1, stop=stop),
}


class Overflowing(Plain):
    """What is embedded is infinite in batch `at`."""

    def __init__(self, at: int | None) -> None:
        super().__init__(tiny_lm("llama"))
        self.at = at
        self.now = False

        def overflow(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return output * torch.inf if self.now else output

        self.lm.get_input_embeddings().register_forward_hook(overflow)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.now = batch_idx == self.at
        return super().training_step(batch, batch_idx)


def decided(selector: Selector, data: Batches, at: int | None, root: Path) -> lp.PruningPlan:
    steps = len(data)
    fit(Overflowing(at), [selector, lp.StructuredCut(at=steps, validate=False)], data, steps, default_root_dir=root)
    assert selector.plan is not None
    return selector.plan


@pytest.mark.parametrize("name", SELECTORS)
def test_what_overflows_is_not_seen(name: str, tmp_path: Path) -> None:
    data = batches(WINDOW)
    found = decided(SELECTORS[name](WINDOW), data, 1, tmp_path)
    expected = decided(SELECTORS[name](WINDOW - 1), Batches([data[0], data[2]]), None, tmp_path)
    assert "NaN" not in found.to_json()
    assert [found.kept_layers, found.kept_heads, found.kept_channels, found.kept_hidden] == [
        expected.kept_layers,
        expected.kept_heads,
        expected.kept_channels,
        expected.kept_hidden,
    ]


@pytest.mark.parametrize("name", SELECTORS)
def test_where_everything_overflows_nothing_is_decided(name: str, tmp_path: Path) -> None:
    with pytest.raises(lp.ConfigError, match="has seen nothing by step 1"):
        decided(SELECTORS[name](1), batches(1), 0, tmp_path)


class Fragile(Plain):
    """What leaves layer 3 overflows where layer 2 was not run."""

    def __init__(self) -> None:
        super().__init__(tiny_lm("llama"))
        layers, ran = self.lm.model.layers, []
        layers[2].mlp.register_forward_hook(lambda *_: ran.append(True))
        layers[3].register_forward_hook(lambda _, inputs, output: output if ran and ran.pop() else output * torch.inf)


def test_a_layer_without_which_the_loss_overflows_stays() -> None:
    selector = lp.GreedyPerplexitySelector(drop=4, stop=2)
    fit(Fragile(), [selector], batches(2), 2)
    assert selector.plan is not None
    assert set(selector.plan.kept_layers) == {2, 3}
    assert "Infinity" not in selector.plan.to_json()
    assert "NaN" not in selector.plan.to_json()


def test_a_search_in_which_everything_overflows() -> None:
    with pytest.raises(lp.ConfigError, match="has seen nothing by step 1"):
        fit(Overflowing(0), [lp.GreedyPerplexitySelector(drop=2, stop=1)], batches(1), 1)
