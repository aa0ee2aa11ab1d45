"""Parameters, bytes and floating-point operations of the model that a plan arrives at, by formula."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from lightprune.anatomy import Anatomy, Shape
from lightprune.errors import check_number
from lightprune.hub import torch_dtype
from lightprune.integrations.zero_params import parameter_count, whole_shape
from lightprune.plan import PruningPlan
from lightprune.surgery import resulting_shapes


@dataclass(frozen=True)
class Workload:
    """What a model is asked to do where it serves.

    Attributes:
        prompt: tokens of each prompt, which are read in one pass.
        context: tokens that came before one that is generated.
        batch: sequences beside each other.
        dtype: of weights and KV cache; None for that of the model.
    """

    prompt: int = 512
    context: int = 2048
    batch: int = 1
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, owner: str, prompt: int, context: int, batch_size: int, dtype: str | None) -> "Workload":
        """A user's settings, checked.

        Args:
            owner: whose settings they are, for what errors say.
            prompt: see above, as the others.
            context: likewise.
            batch_size: `batch`.
            dtype: its name.

        Raises:
            ConfigError: one of them cannot be.
        """
        for key, value in (("prompt", prompt), ("context", context), ("batch_size", batch_size)):
            check_number(owner, key, value, whole=True, least=1)
        return cls(prompt, context, batch_size, None if dtype is None else torch_dtype(dtype))


@dataclass(frozen=True)
class Costs:
    """What a model costs.

    Attributes:
        parameters: tied ones once.
        weights: bytes of all of them.
        cache_per_token: bytes of the KV cache that one token takes, in layers whose window holds it.
        cache: bytes of the KV cache of the whole batch, after `context` tokens.
        prefill: FLOPs of reading the batch's prompts, up to the logits of their last tokens.
        decode: FLOPs of one token more for each sequence of the batch, after `context` others.
        decode_bytes: bytes that such a step reads: the weights that act in it, and the cache.
    """

    parameters: int
    weights: int
    cache_per_token: int
    cache: int
    prefill: int
    decode: int
    decode_bytes: int

    @property
    def memory(self) -> int:
        """Bytes of weights and KV cache."""
        return self.weights + self.cache

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "memory": self.memory}

    def slower_than(self, other: "Costs") -> tuple[float, float]:
        """How many times as long this should take, for a prompt and for a token: the best that a cut can gain.

        A prompt is bound by arithmetic, a generated token by what it reads.
        """
        return self.prefill / other.prefill, self.decode_bytes / other.decode_bytes


def costs_of(anatomy: Anatomy, plan: PruningPlan, work: Workload | None = None) -> Costs:
    """What the model that `plan` arrives at will cost; a plan that removes nothing says it of the model as it is.

    A multiplication and an addition are two FLOPs. A matrix [n, m] costs 2 n m a token, an attention head of D
    dimensions 4 D for each token that it attends to: a token sees itself and those before it, as many as the window of
    its layer holds. Softmax, norms, activations, rotations and biases are left out, as they are everywhere. The head
    makes logits of each sequence's last token alone. Of experts, those that a token is sent to count.

    Args:
        anatomy: of the uncut model.
        plan: what stays.
        work: what the model is asked to do.
    """
    work = work or Workload()
    config, shape = plan.config(anatomy).get_text_config(), plan.shape
    sizes = resulting_shapes(anatomy, plan)
    width = (work.dtype or anatomy.lm.dtype).itemsize
    parameters = sum(size.numel() for size in sizes.values())
    head = _head_size(anatomy, plan)
    embeddings, experts, dense = _split(anatomy, sizes)
    active = _active_experts(config)
    matrices = dense + round(experts * active)
    windows = _windows(config, shape.layers)
    per_key = 4 * shape.heads * shape.head_dim
    seen_in_prompt = sum(_seen(work.prompt, window) for window in windows)
    seen_in_step = sum(min(work.context + 1, window or work.context + 1) for window in windows)
    kept = sum(min(work.context, window or work.context) for window in windows)
    per_layer = 2 * shape.kv_groups * shape.head_dim * width
    cache = work.batch * per_layer * kept
    # A step reads an expert that any of its tokens is sent to.
    read = parameters - embeddings - round(experts * (1 - active) ** work.batch)
    return Costs(
        parameters=parameters,
        weights=parameters * width,
        cache_per_token=per_layer * shape.layers,
        cache=cache,
        prefill=work.batch * (2 * matrices * work.prompt + 2 * head + per_key * seen_in_prompt),
        decode=work.batch * (2 * matrices + 2 * head + per_key * seen_in_step),
        decode_bytes=read * width + cache,
    )


def costs_at_most(anatomy: Anatomy, shape: Shape, work: Workload | None = None) -> Costs:
    """What a model of this shape costs at the most, whichever of its layers stay: large ones, without a window."""
    plan = PruningPlan.arriving_at(anatomy, shape)
    windows = _windows(anatomy.config, plan.source.layers)
    sizes = [parameter_count(layer) for layer in anatomy.layers]
    dearest = sorted(range(len(sizes)), key=lambda index: (-sizes[index], windows[index] is not None))
    return costs_of(anatomy, replace(plan, kept_layers=tuple(sorted(dearest[: shape.layers]))), work)


def _split(anatomy: Anatomy, sizes: dict[str, torch.Size]) -> tuple[int, int, int]:
    """Weights of tables that are looked up alone, of experts, and of the matrices that every token goes through.

    The head is in none of them; a table that is the head too counts as the head.
    """
    head = anatomy.head.weight
    embeddings = experts = dense = 0
    for name, size in sizes.items():
        owner, _, last = name.rpartition(".")
        if anatomy.layer_of(name) is None:
            module = anatomy.lm.get_submodule(owner)
            if getattr(module, last) is head:
                continue
            if isinstance(module, nn.Embedding):
                embeddings += size.numel()
                continue
        if len(size) == 3:
            experts += size.numel()
        elif len(size) == 2:
            dense += size.numel()
    return embeddings, experts, dense


def _head_size(anatomy: Anatomy, plan: PruningPlan) -> int:
    """Weights of the head; in a family with a projection in front of it, hidden dimensions do not change it."""
    vocabulary, inputs = whole_shape(anatomy.head.weight)  # type: ignore[arg-type]
    return vocabulary * (plan.shape.hidden if inputs == plan.source.hidden else inputs)


def _active_experts(config: PretrainedConfig) -> float:
    """The share of a layer's experts that one token goes through; 1 where there are none."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return float(config.num_experts_per_tok / experts) if experts else 1.0


def _windows(config: PretrainedConfig, layers: int) -> list[int | None]:
    """How many tokens each layer attends to; None for all of them."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return [None] * layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _seen(tokens: int, window: int | None) -> int:
    """How many tokens all of a prompt's attend to together."""
    window = min(window or tokens, tokens)
    return window * (window + 1) // 2 + (tokens - window) * window
