"""The coupled groups of a tiny Llama and a tiny GPT-2, written out slice by slice, and plans to remove some of them.

Both have heads of 8 dimensions; two of the Llama's four share each of its two key-value heads.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightprune import PlanFromFile, PruningPlan
from lightprune.anatomy import anatomy_of

# (model, unit, layer, index, layers that stay) -> the group's slices.
Slices = Callable[[PreTrainedModel, str, int, int, Sequence[int]], list[Tensor]]


def llama(lm: PreTrainedModel, unit: str, layer: int, index: int, stay: Sequence[int]) -> list[Tensor]:
    """With biases everywhere, and the embedding as the head."""
    attention, mlp = lm.model.layers[layer].self_attn, lm.model.layers[layer].mlp
    if unit == "channels":
        rows = [p[index] for p in (*mlp.gate_proj.parameters(), *mlp.up_proj.parameters())]
        return [*rows, mlp.down_proj.weight[:, index]]
    own = slice(8 * index, 8 * index + 8)
    if unit == "heads":
        return [*(p[own] for p in attention.q_proj.parameters()), attention.o_proj.weight[:, own]]
    if unit == "kv_groups":
        heads = [s for head in (2 * index, 2 * index + 1) for s in llama(lm, "heads", layer, head, stay)]
        return [*heads, *(p[own] for p in (*attention.k_proj.parameters(), *attention.v_proj.parameters()))]
    found = [lm.model.embed_tokens.weight[:, index], lm.model.norm.weight[index]]
    for kept in (lm.model.layers[i] for i in stay):
        attention, mlp = kept.self_attn, kept.mlp
        readers = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
        found += [reader.weight[:, index] for reader in readers]
        found += [p[index] for writer in (attention.o_proj, mlp.down_proj) for p in writer.parameters()]
        found += [kept.input_layernorm.weight[index], kept.post_attention_layernorm.weight[index]]
    return found


def gpt2(lm: PreTrainedModel, unit: str, layer: int, index: int, stay: Sequence[int]) -> list[Tensor]:
    """Weights [in, out]; q, k and v of a head in the thirds of one projection."""
    attention, mlp = lm.transformer.h[layer].attn, lm.transformer.h[layer].mlp
    if unit == "channels":
        return [mlp.c_fc.weight[:, index], mlp.c_fc.bias[index], mlp.c_proj.weight[index]]
    if unit == "heads":
        own = slice(8 * index, 8 * index + 8)
        thirds = [*attention.c_attn.weight.split(32, 1), *attention.c_attn.bias.split(32)]
        return [*(third[..., own] for third in thirds), attention.c_proj.weight[own]]
    stem = lm.transformer
    found = [stem.wte.weight[:, index], stem.wpe.weight[:, index], *(p[index] for p in stem.ln_f.parameters())]
    for kept in (stem.h[i] for i in stay):
        found += [reader.weight[index] for reader in (kept.attn.c_attn, kept.mlp.c_fc)]
        for writer in (kept.attn.c_proj, kept.mlp.c_proj):
            found += [writer.weight[:, index], writer.bias[index]]
        found += [p[index] for norm in (kept.ln_1, kept.ln_2) for p in norm.parameters()]
    return found


def norm_of(slices: list[Tensor], norm: str) -> Tensor:
    """Root mean square (l2) or mean absolute value (l1) of all weights of one group."""
    flat = torch.cat([piece.flatten() for piece in slices])
    return flat.abs().sum() / flat.numel() if norm == "l1" else (flat @ flat / flat.numel()).sqrt()


# What the plans below remove, by unit: (layer, index) pairs; layer 2 goes as a whole, and counts for nothing else.
STAY = (0, 1, 3, 4, 5)
_CHANNELS = {layer: (layer, layer + 7, 40) for layer in range(6)}
REMOVED: dict[str, dict[str, list[tuple[int, int]]]] = {
    "llama_tied": {  # of the four query heads one stays: its neighbour goes alone, the other two with their group
        "heads": [(0, 1), (1, 0), (3, 2), (4, 1), (5, 0)],
        "kv_groups": [(0, 1), (1, 1), (3, 0), (4, 1), (5, 1)],
        "channels": [(layer, index) for layer in STAY for index in _CHANNELS[layer]],
        "hidden": [(0, index) for index in (3, 17, 18, 31)],
    },
    "gpt2": {
        "heads": [(0, 0), (1, 1), (3, 3), (4, 0), (5, 1)],
        "channels": [(layer, index) for layer in STAY for index in _CHANNELS[layer]],
        "hidden": [(0, index) for index in (0, 5, 6, 7, 20, 21, 30, 31)],
    },
}
SLICES: dict[str, Slices] = {"llama_tied": llama, "gpt2": gpt2}


def plan_for(name: str, lm: PreTrainedModel, *units: str) -> PruningPlan:
    """The plan that removes what `REMOVED` says, layer 2 included, or only these structures of it."""

    def without(count: int, gone: Collection[int]) -> list[int]:
        return [index for index in range(count) if index not in gone]

    kept_heads = [[layer % 4] if name == "llama_tied" else without(4, [layer % 4]) for layer in range(6)]
    kept = {
        "layers": list(STAY),
        "heads": kept_heads,
        "channels": [without(48, _CHANNELS[layer]) for layer in range(6)],
        "hidden": without(32, [index for _, index in REMOVED[name]["hidden"]]),
    }
    return PruningPlan.keeping(anatomy_of(lm), **{unit: kept[unit] for unit in units or kept})


def mean_of(name: str, lm: PreTrainedModel, unit: str, norm: str) -> Tensor:
    """The mean norm of the groups of one structure that go."""
    removed = REMOVED[name][unit]
    return sum(norm_of(SLICES[name](lm, unit, *place, STAY), norm) for place in removed) / len(removed)  # type: ignore[return-value]


def from_file(plan: PruningPlan, folder: Any) -> PlanFromFile:
    """A selector that has nothing to decide."""
    path = folder / "plan.json"
    plan.save(path)
    return PlanFromFile(str(path))
