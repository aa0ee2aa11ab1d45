"""Models that see and write: the text model inside LLaVA, Gemma 3 and Qwen2.5-VL. What sees is left as it is.

The text model lies at `model.language_model`. What brings images to its hidden dimensions loses them with it.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from transformers import PretrainedConfig

from lightprune.anatomy.axes import HIDDEN, Resize
from lightprune.anatomy.base import Axes, Family, Predicate
from lightprune.anatomy.families.llama import LLAMA
from lightprune.anatomy.registry import family_of
from lightprune.anatomy.shape_rules import heads_divide_hidden, heads_fill_hidden
from lightprune.errors import ConfigError

Configure = Callable[[PretrainedConfig, Resize], None]


def _inside(text: Family, bridge: Mapping[str, Axes], configure: Configure | None = None) -> Family:
    """The declaration of a text model's family for the text model inside a wrapper.

    Args:
        text: the family.
        bridge: what brings images to the hidden dimensions, and its axes.
        configure: what else the wrapper's config says of them.
    """

    def configure_both(config: PretrainedConfig, resize: Resize) -> None:
        text.configure(config.get_text_config(), resize)
        if configure is not None:
            configure(config, resize)

    def path(of_text: str) -> str:
        return of_text.replace("model.", "model.language_model.", 1) if of_text.startswith("model.") else of_text

    return replace(
        text,
        layers=path(text.layers),
        stem={**{path(name): axes for name, axes in text.stem.items()}, **bridge},
        configure=configure_both,
        variant=None,
    )


def _llava(config: PretrainedConfig) -> Family:
    text = config.get_text_config()
    family = family_of(text)
    if family.layers != "model.layers":
        raise ConfigError(
            f"lightprune cannot prune LLaVA with a text model of the type {text.model_type!r}, which is built "
            "otherwise than a Llama: choose one with a Llama, Mistral, Qwen or Phi in it."
        )
    rules: tuple[Predicate, ...] = (heads_divide_hidden,) if text.model_type == "llama" else ()
    family = replace(family, predicates=(*family.predicates, *rules))
    # The config gives the projector as many features inside as the text model has hidden dimensions.
    projector = "model.multi_modal_projector"
    return _inside(family, {f"{projector}.linear_1": (HIDDEN, None), f"{projector}.linear_2": (HIDDEN, HIDDEN)})


def _gemma3(config: PretrainedConfig) -> Family:
    projector = "model.multi_modal_projector"
    return replace(_inside(family_of(config.get_text_config()), {projector: (HIDDEN, None)}), transposed=(projector,))


def _vision_output(config: PretrainedConfig, resize: Resize) -> None:
    config.vision_config.out_hidden_size = resize.target.hidden


LLAVA = Family(model_types=("llava",), weights={}, stem={}, variant=_llava)
GEMMA3_WITH_VISION = Family(model_types=("gemma3",), weights={}, stem={}, variant=_gemma3)
QWEN2_5_VL = replace(
    _inside(
        replace(LLAMA, head_dim_field=None, predicates=(heads_fill_hidden,)),
        {"model.visual.merger.mlp.2": (HIDDEN, None)},
        _vision_output,
    ),
    model_types=("qwen2_5_vl",),
)
