"""Anatomy: where the parts of each supported family lie. A new family is one small file and one entry here."""

from transformers import PreTrainedModel

from lightprune.anatomy.axes import STRUCTURES, UNITS, Shape, Structure, Unit
from lightprune.anatomy.base import Anatomy, Family, Weight
from lightprune.anatomy.families.gemma import GEMMA2, GEMMA3
from lightprune.anatomy.families.gpt2 import GPT2
from lightprune.anatomy.families.gpt_neox import GPT_NEOX
from lightprune.anatomy.families.llama import LLAMA
from lightprune.anatomy.families.mixture import MIXTRAL, QWEN3_MOE
from lightprune.anatomy.families.olmo2 import OLMO2
from lightprune.anatomy.families.opt import OPT
from lightprune.anatomy.families.phi import PHI
from lightprune.anatomy.families.phi3 import PHI3
from lightprune.errors import ConfigError
from lightprune.integrations.lightning import check_causal_lm

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    GEMMA2,
    GEMMA3,
    GPT2,
    GPT_NEOX,
    MIXTRAL,
    OLMO2,
    OPT,
    PHI,
    PHI3,
    QWEN3_MOE,
)
_BY_MODEL_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def anatomy_of(lm: PreTrainedModel) -> Anatomy:
    """The anatomy of a causal LM.

    Raises:
        ConfigError: it is no model, or its family has no declaration.
    """
    check_causal_lm(lm, "anatomy_of")
    model_type = lm.config.model_type
    if model_type not in _BY_MODEL_TYPE:
        known = ", ".join(sorted(_BY_MODEL_TYPE))
        raise ConfigError(
            f"lightprune does not know the model family {model_type!r} of {type(lm).__name__} (known: {known}): "
            "choose a model of a known family in `model`, or declare this one in lightprune/anatomy."
        )
    family = _BY_MODEL_TYPE[model_type]
    return Anatomy(family=family if family.variant is None else family.variant(lm.config), lm=lm)


__all__ = [
    "FAMILIES",
    "STRUCTURES",
    "UNITS",
    "Anatomy",
    "Family",
    "Shape",
    "Structure",
    "Unit",
    "Weight",
    "anatomy_of",
]
