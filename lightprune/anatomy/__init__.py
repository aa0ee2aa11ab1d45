"""Anatomy: where layers lie in each supported family. A new family is one small file and one entry here."""

from transformers import PreTrainedModel

from lightprune.anatomy.base import Anatomy, Family
from lightprune.anatomy.gpt2 import GPT2
from lightprune.anatomy.gpt_neox import GPT_NEOX
from lightprune.anatomy.llama import LLAMA
from lightprune.anatomy.opt import OPT
from lightprune.anatomy.phi import PHI
from lightprune.errors import ConfigError

FAMILIES: tuple[Family, ...] = (LLAMA, OPT, PHI, GPT2, GPT_NEOX)
_BY_MODEL_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def anatomy_of(lm: PreTrainedModel) -> Anatomy:
    """The anatomy of a causal LM.

    Raises:
        ConfigError: the model's family has no declaration.
    """
    model_type = lm.config.model_type
    if model_type not in _BY_MODEL_TYPE:
        known = ", ".join(sorted(_BY_MODEL_TYPE))
        raise ConfigError(
            f"lightprune does not know the model family {model_type!r} of {type(lm).__name__} (known: {known}): "
            "choose a model of a known family in `model`, or declare this one in lightprune/anatomy."
        )
    return Anatomy(family=_BY_MODEL_TYPE[model_type], lm=lm)


__all__ = ["FAMILIES", "Anatomy", "Family", "anatomy_of"]
