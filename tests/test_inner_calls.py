"""A module may call the decoder and the head by themselves, for a loss of its own: the parts see the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import lightprune as lp
from lightprune.anatomy import UNITS, anatomy_of
from tests.families import tiny_lm
from tests.selectors.test_scores import padded_batches
from tests.training import Batch, Plain, assert_close, assert_equal, batches, fit, weights


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
    "taylor": lambda: [lp.TaylorUnitSelector(channels=32, stop=2, multiple_of=1)],
    "masks": lambda: [lp.HardConcreteSelector(layers=4, channels=32, stop=4)],
    "search": lambda: [lp.GreedyPerplexitySelector(drop=2, stop=2)],
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


class OnTheSide(OwnLoss):
    """Scores another text between the pass that trains and its backward pass."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        with torch.no_grad():
            super().training_step(batches(1, seed=900)[0], batch_idx)
        return loss


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("parts", PARTS)
def test_a_pass_on_the_side_does_not_disturb_checkpointed_layers(parts: str, reentrant: bool, tmp_path: Path) -> None:
    ends = []
    for kind, checkpointed in ((OwnLoss, False), (OnTheSide, True)):
        module, cut = kind(tiny_lm("llama_tied")), lp.StructuredCut(at=4)
        if checkpointed:
            module.lm.gradient_checkpointing_enable({"use_reentrant": reentrant})
        fit(module, [*PARTS[parts](), cut], batches(6), max_steps=6, default_root_dir=tmp_path)
        assert cut.plan is not None
        ends.append((cut.plan, weights(module)))
    (plan, expected), (other, found) = ends
    assert {u: plan.kept(u, 0) for u in UNITS} == {u: other.kept(u, 0) for u in UNITS}
    assert plan.kept_layers == other.kept_layers
    assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_pass_on_the_side_sees_the_masks_of_evaluation(tmp_path: Path) -> None:
    """In the head too, if it is the embedding, and whichever way the model is called."""
    selector = lp.HardConcreteSelector(stop=9, hidden=24, channels=32)
    seen: list[Tensor] = []

    class Looks(OwnLoss):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            with torch.no_grad():
                whole = self.lm(**batch, use_cache=False).loss
                seen.append(super().training_step(batch, batch_idx) - whole)
            return super().training_step(batch, batch_idx)

    fit(Looks(tiny_lm("llama_tied")), [selector], batches(3), max_steps=3, default_root_dir=tmp_path)
    torch.testing.assert_close(torch.stack(seen), torch.zeros(3))


class Embeds(Plain):
    """Looks up the embeddings by itself."""

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        embeds = self.lm.get_input_embeddings()(batch["input_ids"])
        return {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.lm(**self.inputs(batch), labels=batch["labels"], use_cache=False).loss


class EmbedsAlone(Embeds):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self.lm(**self.inputs(batch), use_cache=False).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


class EmbedsInDecoder(Embeds):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self.lm.get_output_embeddings()(anatomy_of(self.lm).decoder(**self.inputs(batch))[0])
        return cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


class ByPosition(Plain):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        past = () if self.lm.config.model_type != "gpt2" else (None,)
        return self.lm(batch["input_ids"], *past, batch["attention_mask"], labels=batch["labels"]).loss


class Tuples(Plain):
    """Its model gives tuples."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, *_ = self.lm(**batch, use_cache=False, return_dict=False)
        return loss


@pytest.mark.parametrize("kind", [Embeds, ByPosition, Tuples])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_search_whatever_the_model_is_called_with(name: str, kind: type[Plain]) -> None:
    plans = []
    for module in (Plain(tiny_lm(name)), kind(tiny_lm(name))):
        selector = lp.GreedyPerplexitySelector(drop=2, stop=2)
        fit(module, [selector], padded_batches(2), max_steps=2)
        assert selector.plan is not None
        plans.append(selector.plan)
    assert plans[0].dropped_layers == plans[1].dropped_layers
    for one, other in zip(*(plan.provenance["rounds"] for plan in plans), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


class WideHead(Plain):
    """Its head is float32, behind a decoder in bfloat16."""

    def __init__(self) -> None:
        super().__init__(tiny_lm("llama").bfloat16())
        self.lm.lm_head.float()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self.lm.lm_head(self.lm.model(batch["input_ids"])[0].float())
        return cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def test_the_search_where_the_head_has_a_dtype_of_its_own() -> None:
    module, selector = WideHead(), lp.GreedyPerplexitySelector(drop=2, stop=2)
    fit(module, [selector], batches(3), max_steps=3, limit_val_batches=0)
    assert selector.plan is not None
    assert module.lm.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("kind", [EmbedsAlone, EmbedsInDecoder])
def test_a_search_without_any_labels_is_refused_in_the_first_batch(kind: type[Plain]) -> None:
    module = kind()
    before = weights(module)
    with pytest.raises(lp.ConfigError, match="`inputs_embeds` and without `labels`: call the causal LM with `labels`"):
        fit(module, [lp.GreedyPerplexitySelector(drop=2, start=3, stop=4)], batches(4), max_steps=4)
    assert_equal(weights(module), before)
