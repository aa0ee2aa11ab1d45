"""Which families are known: those that lightprune ships, and those that others register."""

from transformers import PretrainedConfig, PreTrainedModel

from lightprune.anatomy.base import Anatomy, Family
from lightprune.errors import ConfigError
from lightprune.integrations.lightning import check_causal_lm

_FAMILIES: dict[str, Family] = {}


def register_family(family: Family, *, replace: bool = False) -> Family:
    """Make a family of causal LMs known to lightprune, in this process.

    Call it before a trainer is made, for example where your module is defined. `lightprune.testing.check_family` checks
    a declaration.

    Args:
        family: the declaration.
        replace: whether it may take the place of one for the same `model_type`.

    Returns:
        The family itself.

    Raises:
        ConfigError: it names no `model_type`, or one that is known already.
    """
    if not family.model_types:
        raise ConfigError("Family.model_types is empty: name at least one `config.model_type`.")
    for model_type in family.model_types:
        if model_type in _FAMILIES and not replace:
            raise ConfigError(
                f"A family for the model type {model_type!r} is registered already: pass `replace=True` to put this "
                "one in its place."
            )
    _FAMILIES.update(dict.fromkeys(family.model_types, family))
    return family


def families() -> tuple[Family, ...]:
    """All families that are registered now, each once."""
    return tuple({id(family): family for family in _FAMILIES.values()}.values())


def anatomy_of(lm: PreTrainedModel) -> Anatomy:
    """The anatomy of a causal LM.

    Raises:
        ConfigError: it is no model, or its family has no declaration.
    """
    check_causal_lm(lm, "anatomy_of")
    return Anatomy(family=family_of(lm.config), lm=lm)


def family_of(config: PretrainedConfig) -> Family:
    """The declaration for models with this config.

    Raises:
        ConfigError: there is none.
    """
    family = _FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(sorted(_FAMILIES))
        raise ConfigError(
            f"lightprune does not know the model family {config.model_type!r} (known: {known}): choose a model of a "
            "known family in `model`, or declare this one and call lightprune.register_family."
        )
    return family if family.variant is None else family.variant(config)
