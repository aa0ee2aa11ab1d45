"""What lightprune asks of transformers' models beyond their public names."""

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


def attention_of(config: PretrainedConfig) -> str | None:
    """The implementation of attention that a model with this config uses."""
    # transformers 5.23: `_attn_implementation`; there is a public way to set it and none to read it. Without it the
    # export would compare logits of two implementations.
    implementation: str | None = config._attn_implementation
    return implementation


def set_attention(config: PretrainedConfig, implementation: str | None) -> None:
    """Let a model with this config use an implementation. `set_attn_implementation` may refuse to go back."""
    config._attn_implementation = implementation  # transformers 5.23: `_attn_implementation`, see `attention_of`


def compute_buffers(lm: PreTrainedModel, module: nn.Module) -> None:
    """Fill the buffers of one of a model's modules that are computed from the config; weights on `meta` are left."""
    # transformers 5.23: `_init_weights` is the only function that does. Without it an export could not be checked.
    lm._init_weights(module)  # type: ignore[no-untyped-call]
