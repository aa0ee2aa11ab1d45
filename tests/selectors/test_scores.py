"""Selectors that score once or search: against plain loops over whole passes."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightprune import (
    BlockInfluenceSelector,
    ConfigError,
    GreedyPerplexitySelector,
    HardConcreteSelector,
    LayerGateSelector,
    PlanFromFile,
    PruningPlan,
    RandomSelector,
    StructuredCut,
)
from lightprune.anatomy import anatomy_of
from lightprune.selectors import Selector
from tests.families import FAMILIES, NUM_LAYERS, left_padded, tiny_lm
from tests.training import Batch, Plain, assert_equal, batches, fit, weights


def padded_batches(count: int) -> list[Batch]:
    drawn = [left_padded(seed=seed) for seed in range(count)]
    return [b | {"labels": b["input_ids"].masked_fill(b["attention_mask"] == 0, -100)} for b in drawn]


@pytest.mark.parametrize("name", FAMILIES)
def test_block_influence_is_a_mean_over_tokens_one_by_one(name: str) -> None:
    lm, data = tiny_lm(name), padded_batches(2)
    data[1] = {key: values[2:] for key, values in data[1].items()}  # with a few tokens alone
    sums, count = [0.0] * NUM_LAYERS, 0
    for batch in data:
        with torch.no_grad():
            states = hidden_states(lm, batch)
        real = batch["attention_mask"].nonzero().tolist()
        count += len(real)
        for index, (hidden_in, hidden_out) in enumerate(states):
            influence = 0.0
            for b, t in real:
                x, y = hidden_in[b, t].tolist(), hidden_out[b, t].tolist()
                dot = sum(i * o for i, o in zip(x, y, strict=True))
                influence += 1 - dot / math.sqrt(sum(i * i for i in x) * sum(o * o for o in y))
            sums[index] += influence
    expected = [total / count for total in sums]
    selector = BlockInfluenceSelector(drop=2, stop=2)
    module = Plain(lm)
    before = weights(module)
    fit(module, [selector], data, max_steps=2)
    assert selector.plan is not None
    assert selector.plan.provenance["block_influence"] == pytest.approx(expected, abs=1e-5)
    assert selector.plan.dropped_layers == tuple(sorted(sorted(range(NUM_LAYERS), key=expected.__getitem__)[:2]))
    assert_equal(weights(module), before)


def hidden_states(lm: PreTrainedModel, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    seen: list[tuple[Tensor, Tensor]] = []
    handles = [layer.register_forward_hook(lambda m, i, o: seen.append((i[0], o))) for layer in anatomy_of(lm).layers]
    lm(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def naive_search(
    lm: PreTrainedModel, data: list[Batch], drop: int, candidates: list[int]
) -> tuple[list[int], list[dict[int, float]]]:
    """SLEB with a whole pass, over every batch, for every trial; the model in evaluation mode."""
    lm = copy.deepcopy(lm).eval()
    out: set[int] = set()
    for index, layer in enumerate(anatomy_of(lm).layers):
        layer.register_forward_hook(lambda m, i, o, index=index: i[0] if index in out else o)
    dropped: list[int] = []
    rounds = []
    for _ in range(drop):
        losses = {}
        for trial in (index for index in candidates if index not in dropped):
            out.clear()
            out.update([*dropped, trial])
            total, count = 0.0, 0
            for batch in data:
                with torch.no_grad():
                    logits = lm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                scores = logits[:, :-1].log_softmax(-1)
                target = batch["labels"][:, 1:]
                kept = target != -100
                total -= scores.gather(-1, target.clamp(min=0)[..., None])[..., 0][kept].sum().item()
                count += int(kept.sum())
            losses[trial] = total / count
        dropped.append(min(losses, key=losses.__getitem__))
        rounds.append(losses)
    return dropped, rounds


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_search_equals_whole_passes(name: str) -> None:
    # Dropout would make training-mode losses random: the search must not see it.
    dropout = {"attention_dropout": 0.2} if name in ("llama", "qwen2") else {}
    lm, data = tiny_lm(name, **dropout), padded_batches(3)
    protect = (1, 0) if name == "mistral" else (0, 0)
    dropped, rounds = naive_search(lm, data, 3, list(range(protect[0], NUM_LAYERS - protect[1])))
    selector = GreedyPerplexitySelector(drop=3, stop=3, protect_first=protect[0], protect_last=protect[1])
    module = Plain(lm)
    before = weights(module)
    fit(module, [selector], data, max_steps=3)
    assert selector.plan is not None
    history = selector.plan.provenance["rounds"]
    assert [entry["dropped"] for entry in history] == dropped
    for entry, losses in zip(history, rounds, strict=True):
        assert {int(index): loss for index, loss in entry["loss"].items()} == pytest.approx(losses, abs=1e-5)
    assert_equal(weights(module), before)
    assert module.lm.training
    assert not any("forward" in vars(layer) for layer in anatomy_of(module.lm).layers)


def test_greedy_search_counts_what_it_is_shown_under_accumulation() -> None:
    """With accumulation, a window of optimizer steps holds that many more batches."""
    lm, data = tiny_lm(), padded_batches(4)
    dropped, _ = naive_search(lm, data, 1, list(range(NUM_LAYERS)))
    selector = GreedyPerplexitySelector(drop=1, stop=2)
    fit(Plain(lm), [selector], data, max_steps=2, accumulate_grad_batches=2)
    assert selector.plan is not None
    assert list(selector.plan.dropped_layers) == dropped


def every_selector(drop: int, first: int, last: int) -> list[Selector]:
    protect: dict[str, Any] = {"protect_first": first, "protect_last": last}
    return [
        LayerGateSelector(drop=drop, steps_per_round=1, **protect),
        BlockInfluenceSelector(drop=drop, stop=1, **protect),
        GreedyPerplexitySelector(drop=drop, stop=1, **protect),
        RandomSelector(drop=drop, **protect),
    ]


@pytest.mark.parametrize(("first", "last"), [(2, 0), (0, 2), (1, 1), (3, 1)])
def test_protected_layers_never_go(first: int, last: int) -> None:
    free = set(range(first, NUM_LAYERS - last))
    for selector in every_selector(len(free), first, last):
        fit(Plain(), [selector], batches(5), max_steps=5)
        assert selector.plan is not None
        assert set(selector.plan.dropped_layers) == free, type(selector).__name__


def test_random_is_reproducible_and_depends_on_its_seed_alone() -> None:
    def draw(seed: int, torch_seed: int) -> tuple[int, ...]:
        torch.manual_seed(torch_seed)
        selector = RandomSelector(drop=3, seed=seed)
        fit(Plain(), [selector], batches(1), max_steps=1)
        assert selector.plan is not None
        return selector.plan.dropped_layers

    draws = [draw(seed, 0) for seed in range(6)]
    assert draws == [draw(seed, 1) for seed in range(6)]
    assert len(set(draws)) > 1


def test_plan_from_file_is_the_plan_that_was_saved(tmp_path: Path) -> None:
    first = BlockInfluenceSelector(drop=2, stop=1)
    fit(Plain(), [first], batches(1), max_steps=1)
    assert first.plan is not None
    path = tmp_path / "plan.json"
    first.plan.save(path)
    second = PlanFromFile(str(path))
    fit(Plain(), [second], batches(1), max_steps=1)
    assert second.plan is not None
    assert second.plan.kept_layers == first.plan.kept_layers
    assert second.plan.provenance["made_by"] == first.plan.provenance
    second.plan.save(path)
    assert PruningPlan.load(path) == second.plan


def test_a_plan_is_read_once_when_the_run_begins(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    anatomy = anatomy_of(tiny_lm())
    PruningPlan.dropping(anatomy, [1]).save(path)

    class Meddling(Plain):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            PruningPlan.dropping(anatomy, [2, 3]).save(path)
            return super().training_step(batch, batch_idx)

    selector = PlanFromFile(str(path), start=2)
    fit(Meddling(), [selector, StructuredCut(at=3, validate=False)], batches(4), 4)
    assert selector.plan is not None
    assert selector.plan.dropped_layers == (1,)


def test_foresight_needs_no_training(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PruningPlan.dropping(anatomy_of(tiny_lm()), [1, 4]).save(path)
    foreseen: list[PruningPlan | None] = []

    class Stop(Exception):
        pass

    class Look(Plain):
        def on_train_start(self) -> None:
            foreseen.extend(selector.foresee() for selector in self.trainer.callbacks if isinstance(selector, Selector))
            raise Stop

    for selector in (*every_selector(2, 0, 0), PlanFromFile(str(path))):
        with pytest.raises(Stop):
            fit(Look(), [selector], batches(1), max_steps=4)
    gates, influence, greedy, random, file = foreseen
    assert gates is influence is greedy is None
    assert random is not None
    assert file is not None
    assert file.dropped_layers == (1, 4)
    selector = RandomSelector(drop=2)
    fit(Plain(), [selector], batches(1), max_steps=1)
    assert selector.plan is not None
    assert selector.plan.kept_layers == random.kept_layers


def test_all_layers_cannot_go() -> None:
    with pytest.raises(ConfigError, match="from 1 to 5"):
        fit(Plain(), [RandomSelector(drop=NUM_LAYERS)], batches(1), max_steps=1)


def test_greedy_search_of_experts_that_balance_their_load() -> None:
    """Their routing is asked for in training, and there is none where all layers are left out."""
    lm = tiny_lm("mixtral")
    lm.config.output_router_logits = True
    selector, module = GreedyPerplexitySelector(drop=2, stop=2), Plain(lm)
    fit(module, [selector], padded_batches(2), max_steps=2)
    lm.config.output_router_logits = False
    other = GreedyPerplexitySelector(drop=2, stop=2)
    fit(module, [other], padded_batches(2), max_steps=2)
    assert selector.plan is not None
    assert other.plan is not None
    assert selector.plan.provenance == other.plan.provenance


class Idle(Plain):
    """Its step never asks the model."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return next(self.lm.parameters()).square().sum()


@pytest.mark.parametrize(
    "selector",
    [
        BlockInfluenceSelector(drop=2, stop=2),
        GreedyPerplexitySelector(drop=2, stop=2),
        LayerGateSelector(drop=1, steps_per_round=2),
        HardConcreteSelector(layers=4, stop=2),
    ],
)
def test_nothing_to_decide_by(selector: Selector) -> None:
    with pytest.raises(ConfigError, match=f"{type(selector).__name__} has seen nothing by step 2"):
        fit(Idle(), [selector], batches(3), max_steps=3)
