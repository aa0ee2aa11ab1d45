"""A module may call the decoder and the head by themselves, for a loss of its own: the parts see the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.nn.functional import cross_entropy

import lightprune as lp
from lightprune.anatomy import anatomy_of
from tests.families import tiny_lm
from tests.selectors.test_scores import padded_batches
from tests.training import Batch, Plain, assert_close, batches, fit, weights


class OwnLoss(Plain):
    """Computes the LM's loss without a call of the LM."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        states = anatomy_of(self.lm).decoder(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        )[0]
        logits = self.lm.get_output_embeddings()(states)
        return cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


PARTS: dict[str, Callable[[], list[Any]]] = {
    "influence, penalty": lambda: [lp.BlockInfluenceSelector(drop=2, stop=2), lp.DifferencePenalty(strength=1.0)],
    "gates": lambda: [lp.LayerGateSelector(drop=2, steps_per_round=1, l1=0.5)],
    "units, group norms": lambda: [lp.RandomUnitSelector(channels=32), lp.GroupNormPenalty(strength=1.0)],
    "activations": lambda: [lp.ActivationUnitSelector(channels=32, stop=2, multiple_of=1)],
    "masks": lambda: [lp.HardConcreteSelector(layers=4, channels=32, stop=4)],
}


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gpt_neox_sequential"])
def test_the_same_without_a_call_of_the_lm(name: str, parts: str, tmp_path: Path) -> None:
    ends = []
    for kind in (Plain, OwnLoss):
        module, cut = kind(tiny_lm(name)), lp.StructuredCut(at=4)
        data = [*padded_batches(4), *batches(2)]
        fit(module, [*PARTS[parts](), cut], data, max_steps=6, default_root_dir=tmp_path)
        assert cut.plan is not None
        ends.append((cut.plan, weights(module)))
    (plan, expected), (other, found) = ends
    assert plan.kept_layers == other.kept_layers
    assert_close(found, expected, rtol=1e-3, atol=1e-5)
