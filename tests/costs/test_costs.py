"""Costs by formula: against PyTorch's counter of FLOPs, real caches, and models that were really cut."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

from lightprune.anatomy import Shape, anatomy_of
from lightprune.costs import Costs, Workload, costs_of
from lightprune.plan import PruningPlan
from lightprune.surgery import cut_model
from tests.families import FAMILIES, tiny_lm

TOKENS = 8


def wide(name: str) -> PreTrainedModel:
    """A tiny model whose windows, if it has any, hold all tokens."""
    windows = getattr(tiny_lm(name).config, "sliding_window", None)
    return tiny_lm(name, **({} if windows is None else {"sliding_window": 64})).eval()


def eager(name: str) -> PreTrainedModel:
    """With the plain implementations, all of whose products the counter sees."""
    lm = wide(name)
    lm.set_attn_implementation("eager")
    if name in ("mixtral", "qwen3_moe"):
        lm.set_experts_implementation("eager")
    return lm


def costs(lm: PreTrainedModel, plan: PruningPlan | None = None, **work: int) -> Costs:
    anatomy = anatomy_of(lm)
    return costs_of(anatomy, plan or PruningPlan.of(anatomy), Workload(**{"prompt": TOKENS, "context": TOKENS, **work}))


def counted(lm: PreTrainedModel, tokens: int, cache: DynamicCache | None = None) -> int:
    ids = torch.arange(1, tokens + 1).unsqueeze(0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        lm(input_ids=ids, logits_to_keep=1, past_key_values=cache, use_cache=cache is not None)
    return int(counter.get_total_flops())


def products(shape: Shape, queries: int, keys: int) -> int:
    """FLOPs of queries x keys and weights x values, all of them, as the counter sees them without a causal kernel."""
    return 4 * shape.layers * shape.heads * shape.head_dim * queries * keys


@pytest.mark.parametrize("name", FAMILIES)
def test_flops_are_those_that_pytorch_counts(name: str) -> None:
    lm = eager(name)
    shape, found = anatomy_of(lm).shape, costs(lm)
    # A causal kernel computes the pairs of a token with itself and those before it.
    pairs = products(shape, TOKENS, TOKENS + 1) // 2
    assert found.prefill - pairs == counted(lm, TOKENS) - products(shape, TOKENS, TOKENS)
    cache = DynamicCache(config=lm.config)
    counted(lm, TOKENS, cache)
    assert found.decode == counted(lm, 1, cache)
    assert costs(lm, batch=3).prefill == 3 * found.prefill
    assert costs(lm, batch=3).decode == 3 * found.decode


@pytest.mark.parametrize("name", FAMILIES)
def test_bytes_are_those_of_the_model_and_its_cache(name: str) -> None:
    lm = wide(name)
    found = costs(lm)
    assert found.parameters == sum(p.numel() for p in lm.parameters())
    assert found.weights == sum(p.numel() * p.element_size() for p in lm.parameters())
    cache = DynamicCache(config=lm.config)
    with torch.no_grad():
        lm(input_ids=torch.arange(1, TOKENS + 1).unsqueeze(0), past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert found.cache == held == TOKENS * found.cache_per_token
    assert found.memory == found.weights + held
    half = costs_of(anatomy_of(lm), PruningPlan.of(anatomy_of(lm)), Workload(dtype=torch.bfloat16))
    assert 2 * half.weights == found.weights


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_foretold_of_a_cut_is_so_after_it(name: str) -> None:
    lm = tiny_lm(name).eval()
    anatomy = anatomy_of(lm)
    allowed = anatomy.family.structures
    target = replace(
        anatomy.shape,
        layers=2,
        channels=24 if "channels" in allowed else anatomy.shape.channels,
    )
    plan = PruningPlan.arriving_at(anatomy, target)
    foretold = costs(lm, plan, batch=2)
    cut_model(anatomy, plan)
    assert costs(lm, batch=2) == foretold


def test_a_window_bounds_what_is_attended_to_and_kept() -> None:
    whole, narrow = (tiny_lm("mistral", sliding_window=window) for window in (None, 4))
    shape = anatomy_of(whole).shape
    per_key = 4 * shape.layers * shape.heads * shape.head_dim
    # Of 8 tokens the last 4 see 4 each, not 5, 6, 7 and 8.
    assert costs(whole).prefill - costs(narrow).prefill == per_key * (1 + 2 + 3 + 4)
    assert costs(whole).decode - costs(narrow).decode == per_key * (9 - 4)
    assert costs(whole).cache == 2 * costs(narrow).cache


def test_a_step_reads_what_acts_in_it() -> None:
    """Neither a table that is only looked up, nor experts that no token is sent to."""
    lm = tiny_lm("llama")
    found, table = costs(lm), lm.get_input_embeddings().weight
    assert found.decode_bytes == found.weights - table.nbytes + found.cache
    tied = costs(tiny_lm("llama_tied"))
    assert tied.decode_bytes == tied.weights + tied.cache
    mixture = tiny_lm("mixtral")
    experts = sum(p.nbytes for n, p in mixture.named_parameters() if ".experts." in n)
    one, three = costs(mixture), costs(mixture, batch=3)
    read = one.weights - mixture.get_input_embeddings().weight.nbytes
    assert one.decode_bytes == read - experts / 2 + one.cache  # 2 of 4 experts for each token
    assert three.decode_bytes == read - experts / 8 + three.cache
