"""What stock `transformers` classes can express: the form in which a model goes out, and the gate before training."""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from lightprune.anatomy import Anatomy
from lightprune.errors import ConfigError
from lightprune.plan import PruningPlan
from lightprune.surgery import resulting_shapes

# What the config of a Llama declares and the others do not, or what saving states anew.
_NOT_CARRIED = ("attention_bias", "mlp_bias", "pretraining_tp", "architectures", "transformers_version")


@dataclass(frozen=True)
class StockForm:
    """A stock class that computes what a model computes, and the config for it.

    Attributes:
        model_class: the class that `AutoModelForCausalLM` makes of `config`.
        config: states the counts of the model.
        reason: why this is not the model's own class, in words; None where it is.
    """

    model_class: type[PreTrainedModel]
    config: PretrainedConfig
    reason: str | None = None

    def build(self) -> PreTrainedModel:
        """The model on the `meta` device: names and shapes, no weights. It has a config of its own."""
        with torch.device("meta"):
            return self.model_class(copy.deepcopy(self.config))


def stock_form(lm: PreTrainedModel, config: PretrainedConfig) -> StockForm:
    """The stock class that can hold a model with this config.

    It is the model's own class, but for a Llama whose heads do not divide the hidden dimensions. `LlamaConfig` refuses
    that; Mistral without a sliding window computes the same where nothing has a bias, and Granite with all of its
    multipliers neutral where something has.

    Args:
        lm: the model, cut or not.
        config: of `lm`, or of what it will be.

    Raises:
        ConfigError: no stock class can.
    """
    text = config.get_text_config()
    hidden, heads = text.hidden_size, text.num_attention_heads
    if config.model_type != "llama" or hidden % heads == 0:
        stock: Any = _mapping_for(config).get(type(config), type(lm))
        return StockForm(stock, config)
    if type(lm) is not LlamaForCausalLM:
        below = hidden // heads * heads
        raise ConfigError(
            f"The plan cannot be exported: {type(config).__name__} refuses {hidden} hidden dimensions with {heads} "
            f"heads, which do not divide them, and no other class can stand in for {type(lm).__name__}, which is not "
            f"the stock Llama; keep {below} or {below + heads} hidden dimensions."
        )
    refused = f"`LlamaConfig` refuses {hidden} hidden dimensions with {heads} heads, which do not divide them"
    if config.attention_bias or config.mlp_bias:
        return StockForm(
            GraniteForCausalLM,
            _carried(config, GraniteConfig, **_biases(config), **_neutral_multipliers(config.head_dim)),
            f"{refused}; Granite with neutral multipliers computes the same, biases included",
        )
    return StockForm(
        MistralForCausalLM,
        _carried(config, MistralConfig, sliding_window=None),
        f"{refused}; Mistral without a sliding window computes the same",
    )


def auto_class(config: PretrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """What loads a model with this config: `AutoModelForCausalLM`, where it can."""
    takes_images = _mapping_for(config) is MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if takes_images else AutoModelForCausalLM


def _mapping_for(config: PretrainedConfig) -> Any:
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return MODEL_FOR_CAUSAL_LM_MAPPING if known else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def state_tie(config: PretrainedConfig, tied: bool) -> None:
    """Let a config say whether the head is the embedding, also what it says of its text."""
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = tied


def check_expressible(anatomy: Anatomy, plan: PruningPlan) -> None:
    """Refuse a plan whose result no stock class can hold, before anything is trained for it.

    Builds the class on the `meta` device and compares the names and shapes of all parameters. Only the plan's counts
    matter, not its indices. Costs well under a second.

    Args:
        anatomy: of the uncut model.
        plan: a valid plan for it.

    Raises:
        ConfigError: the config refuses the counts, or the class has other parameters than the cut model will have.
    """
    config = plan.config(anatomy)
    state_tie(config, is_tied(anatomy.lm))
    form = stock_form(anatomy.lm, config)
    check_config(form.config)
    try:
        stock = form.build()
    except Exception as error:  # whatever a class raises for counts that it cannot have
        raise _refusal(form.model_class, error) from error
    difference = parameter_difference(resulting_shapes(anatomy, plan), stock)
    if difference is not None:
        raise ConfigError(
            f"The plan cannot be exported: {difference}; change the counts to keep, or prune a model that adds nothing "
            "to its class (adapters can be merged before)."
        )


def parameter_difference(ours: Mapping[str, torch.Size], stock: PreTrainedModel) -> str | None:
    """How the parameters of a model differ from those of its stock class, in words; None where they do not."""
    theirs = {name: parameter.shape for name, parameter in stock.named_parameters()}
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if not differing:
        return None
    first = differing[0]
    return (
        f"{len(differing)} parameters would not be those of a stock {type(stock).__name__} (such as {first}: "
        f"{_size(ours, first)}, not {_size(theirs, first)})"
    )


def check_config(config: PretrainedConfig) -> None:
    """Run a config's own validation, as saving and loading it would.

    Raises:
        ConfigError: it finds its own values impossible.
    """
    validate = getattr(config, "validate", None)  # not every config class has it
    if validate is None:
        return
    try:
        validate()
    except Exception as error:
        raise _refusal(type(config), error) from error


def is_tied(lm: PreTrainedModel) -> bool:
    """Whether the output head is the input embedding: one tensor, whatever the config says."""
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head is not None and head.weight is embedding.weight


def _carried(config: PretrainedConfig, target: type[PretrainedConfig], **values: object) -> PretrainedConfig:
    """What a Llama's config declares, in another class.

    What somebody added to the config stays behind: it means nothing to a Llama, and might to the other class.
    """
    declared = {
        entry.name: copy.deepcopy(getattr(config, entry.name)) for entry in dataclasses.fields(cast(Any, config))
    }
    return target(**{name: value for name, value in declared.items() if name not in _NOT_CARRIED} | values)


def _biases(config: PretrainedConfig) -> dict[str, bool]:
    return {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


def _neutral_multipliers(head_dim: int) -> dict[str, float]:
    """Granite's multipliers at the values that make it a Llama."""
    return {
        "attention_multiplier": head_dim**-0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }


def _refusal(kind: type, error: Exception) -> ConfigError:
    reason = str(error.__cause__ or error).strip().split("\n")[0].rstrip(".")
    return ConfigError(
        f"The plan cannot be exported: {kind.__name__} refuses it ({reason}); change the counts to keep."
    )


def _size(shapes: Mapping[str, torch.Size], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "none"
