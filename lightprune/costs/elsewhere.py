"""What a shape loses elsewhere: tools that read an exported directory and would refuse it, or compute something else.

Found by running each tool on exports of this package on a CPU (llama.cpp by llama-cpp-python 0.3.36, optimum-onnx 0.1,
CTranslate2 4.8, torchao int4), but for vLLM, whose rules were read in the code.
"""

from collections.abc import Callable, Iterator, Mapping

from transformers import PretrainedConfig

from lightprune.anatomy import Shape

_BLOCK = 32  # weights that share a scale in GGUF's and torchao's formats

# Whose kinds of layers llama.cpp and transformers' reader of GGUF files do not read but assume: the
# period, and which layers are of the kind that comes once in it.
_PERIODS: Mapping[str, tuple[int, Callable[[PretrainedConfig], list[bool]]]] = {
    "gemma2": (2, lambda config: [kind == "full_attention" for kind in config.layer_types]),
    "gemma3_text": (6, lambda config: [kind == "full_attention" for kind in config.layer_types]),
    "smollm3": (4, lambda config: [not rotated for rotated in config.no_rope_layers]),
}

_HEADS_FILL: Mapping[str, tuple[str, ...]] = {
    "llama.cpp": ("olmo2", "granite", "phi3"),
    "vLLM": ("qwen2", "olmo2"),
    "CTranslate2": ("llama",),
}
"""Tools that have no size of a head of their own, or pass it over, for these families."""


def obstacles(config: PretrainedConfig, source: Shape, target: Shape) -> list[str]:
    """What other tools do with a cut model that they do not do with the uncut one: a sentence each.

    Args:
        config: what the cut model's config says of its text.
        source: the uncut model's counts.
        target: the cut model's.
    """
    found = [_pattern(config), _heads(config, source, target), *_widths(source, target), _phi(config, source, target)]
    return [sentence for sentence in found if sentence is not None]


def _pattern(config: PretrainedConfig) -> str | None:
    if config.model_type not in _PERIODS:
        return None
    period, read = _PERIODS[config.model_type]
    if read(config) == [(index + 1) % period == 0 for index in range(config.num_hidden_layers)]:
        return None
    return (
        f"One in {period} layers of this family is of another kind, and llama.cpp and GGUF files assume that it is "
        f"every {period}th. Here it is not, and they compute something else without a word: let whole runs of {period} "
        "layers go, or stay with safetensors."
    )


def _heads(config: PretrainedConfig, source: Shape, target: Shape) -> str | None:
    filled = target.heads * target.head_dim
    if target.hidden == filled or source.hidden != source.heads * source.head_dim:
        return None
    tools = sorted(["optimum-onnx", *(tool for tool, kinds in _HEADS_FILL.items() if config.model_type in kinds)])
    return (
        f"{target.heads} heads of {target.head_dim} dimensions have {filled} together, and there are {target.hidden} "
        f"hidden dimensions: {', '.join(tools)} would take a head to have {target.hidden} / {target.heads}. With "
        f"{filled} hidden dimensions they would not."
    )


def _widths(source: Shape, target: Shape) -> Iterator[str]:
    for name, old, new in (
        ("MLP channels", source.channels, target.channels),
        ("hidden dimensions", source.hidden, target.hidden),
    ):
        if new != old and new % _BLOCK and not old % _BLOCK:
            yield (
                f"{new} {name} are no multiple of {_BLOCK}, which the packed formats of llama.cpp and torchao want: "
                f"{max(round(new / _BLOCK), 1) * _BLOCK} would be."
            )


def _phi(config: PretrainedConfig, source: Shape, target: Shape) -> str | None:
    wanted = 4 * target.hidden
    if config.model_type != "phi" or target.channels == wanted or source.channels != 4 * source.hidden:
        return None
    return (
        f"llama.cpp wants 4 MLP channels in Phi for each hidden dimension, {wanted}, and there are {target.channels}."
    )
