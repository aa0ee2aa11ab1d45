"""Converts what a stock class cannot hold into what it can hold, without changing the model in memory."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightprune.surgery.stock_class import StockForm, check_config, is_tied, stock_form


@dataclass(frozen=True)
class Outgoing:
    """The model to write.

    Attributes:
        model: the model in memory itself, or a twin that shares its weights; a twin can be saved, not run.
        exact: whether it computes the same in the same steps, so that only a mistake can make logits differ.
        notes: what is not as it was in memory, and why: a sentence each, in Markdown.
    """

    model: PreTrainedModel
    exact: bool = True
    notes: tuple[str, ...] = ()


def outgoing(lm: PreTrainedModel) -> Outgoing:
    """The model to write for the model in memory.

    Raises:
        ConfigError: no stock class can hold it.
    """
    form = stock_form(lm, lm.config)
    check_config(form.config)
    factor = excess_embedding_scale(lm)
    folded = folded_embedding(lm, factor) if factor != 1 else {}
    notes = []
    if form.reason is not None:
        notes.append(f"Saved as `{form.model_class.__name__}`, not `{type(lm).__name__}`: {form.reason}.")
    if folded:
        notes.append(
            f"The embedding carries a factor of {factor:.6g}{', the final norm its inverse' if is_tied(lm) else ''}: "
            "Gemma scales embeddings by the root of its hidden dimensions, and this one was trained with another scale."
        )
    if not notes:
        return Outgoing(lm)
    return Outgoing(_twin(lm, form, folded), exact=not folded, notes=tuple(notes))


def excess_embedding_scale(lm: PreTrainedModel) -> float:
    """By how much the embedding's scale in memory exceeds that of the reloaded model; 1 where there is none.

    Gemma multiplies embeddings by a buffer that is not saved: a reloaded model has sqrt(hidden) of its config in it, a
    cut one still that of the uncut model. Both are rounded to the dtype of the weights before use.
    """
    scale = getattr(lm.get_input_embeddings(), "embed_scale", None)
    if not isinstance(scale, Tensor):
        return 1.0
    stock = torch.tensor(lm.config.get_text_config().hidden_size ** 0.5)
    return scale.to(lm.dtype).item() / stock.to(lm.dtype).item()


@torch.no_grad()
def folded_embedding(lm: PreTrainedModel, factor: float) -> dict[str, Tensor]:
    """Gemma's weights with an embedding scale folded in, by name.

    E' = factor * E. A tied head is the same matrix, so the final norm, which multiplies by 1 + w, takes the factor out
    again: w' = (1 + w) / factor - 1.
    """
    text = "model" if lm.config.get_text_config() is lm.config else "model.language_model"
    embedding, norm = lm.get_parameter(f"{text}.embed_tokens.weight"), lm.get_parameter(f"{text}.norm.weight")
    wide = torch.promote_types(embedding.dtype, torch.float32)
    folded = {f"{text}.embed_tokens.weight": (embedding.to(wide) * factor).to(embedding.dtype)}
    if is_tied(lm):
        folded["lm_head.weight"] = folded[f"{text}.embed_tokens.weight"]
        folded[f"{text}.norm.weight"] = ((1 + norm.to(wide)) / factor - 1).to(norm.dtype)
    return folded


def _twin(lm: PreTrainedModel, form: StockForm, replaced: Mapping[str, Tensor]) -> PreTrainedModel:
    """The stock class with the model's own tensors, but for those that are replaced."""
    twin = form.build()
    twin.load_state_dict(lm.state_dict() | dict(replaced), assign=True)
    twin.generation_config = copy.deepcopy(lm.generation_config)
    return twin
