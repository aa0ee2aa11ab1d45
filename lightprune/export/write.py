"""The directory: written beside its place, verified, and only then given its name. What fails is kept."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import reduce
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from lightprune.errors import ConfigError, ExportError
from lightprune.export.card import Card, model_card
from lightprune.export.compat import complete_config, complete_tokenizer, requirement
from lightprune.export.convert import Outgoing, outgoing
from lightprune.export.probe import plain_outputs
from lightprune.export.target import check_target, make_draft, put_in_place, reason_file
from lightprune.export.tokenizer import Tokenizer
from lightprune.export.verify import verify_export
from lightprune.hub import Dtype, torch_dtype, without_progress_bars
from lightprune.integrations.dtypes import in_dtype, main_dtype
from lightprune.integrations.lightning import check_causal_lm
from lightprune.masks.forward_passes import evaluating
from lightprune.plan import PruningPlan
from lightprune.surgery.stock_class import is_tied, state_tie

# What is written into a model's config for saving, and taken back.
_CONFIG_FIELDS = ("dtype", "architectures", "tie_word_embeddings", "use_cache")

# What of a `GenerationConfig` acts only where tokens are sampled, and only where beams are searched.
_FOR_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_FOR_BEAMS = ("early_stopping", "length_penalty")


def check_generation_config(lm: PreTrainedModel) -> None:
    """Refuse settings for generation that `transformers` will not save.

    Raises:
        ConfigError: they contradict one another.
    """
    config = getattr(lm, "generation_config", None)
    if config is None:
        return
    try:
        _saveable(config).validate(strict=True)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"The model's generation_config cannot be saved ({reason}): correct `lm.generation_config` before training."
        ) from error


def _saveable(config: GenerationConfig) -> GenerationConfig:
    """A copy without settings that have no effect but keep `transformers` from saving, as in some models on the Hub."""
    config = copy.deepcopy(config)
    sampling = () if config.do_sample or config.penalty_alpha else _FOR_SAMPLING
    beams = () if (config.num_beams or 1) > 1 else _FOR_BEAMS
    for name in (*sampling, *beams):
        setattr(config, name, None)
    if config.pad_token_id is not None and config.pad_token_id < 0:
        config.pad_token_id = None
    config.use_cache = True
    return config


def export_hf(
    lm: PreTrainedModel,
    path: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    plan: PruningPlan | None = None,
    card: Card | None = None,
    overwrite: bool = False,
    dtype: Dtype | None = None,
) -> Path:
    """Write a model as a Hugging Face directory that plain `transformers` loads.

    The directory appears under its name only after it was reloaded with `AutoModelForCausalLM`, had every weight, and
    gave the logits of the model in memory. Until then it is called `<path>-unverified`, and keeps that name if anything
    fails; `<path>-unverified.txt` then tells the reason. A model that its own class cannot hold goes out as another
    stock class that computes the same; the model card then says so. The model is as it was afterwards: class, weights,
    mode, config.

    Args:
        lm: the model; gates and their hooks are off it.
        path: the directory to write.
        tokenizer: saved beside the model; a processor too.
        plan: saved as `pruning_plan.json` and told in the model card.
        card: what else the model card tells.
        overwrite: replace an earlier export at `path`.
        dtype: dtype of the exported weights; None keeps that of each of them.

    Raises:
        ConfigError: `lm` is no model, `path` is taken, `dtype` is unknown, or no stock class can hold the model;
            nothing is written.
        ExportError: the reloaded model is not the same, or something else failed; what was written is kept.
    """
    check_causal_lm(lm, "export_hf")
    target = check_target(path, overwrite=overwrite)
    weights_dtype = None if dtype is None else torch_dtype(dtype)
    with _as_exported(lm, weights_dtype), without_progress_bars():
        out = outgoing(lm)
        with _kept_if_it_fails(target) as draft:
            with plain_outputs(out.model):
                _save(out, lm, draft)
            complete_config(draft, dtype=main_dtype(out.model))
            if plan is not None:
                plan.save(draft / "pruning_plan.json")
            notes = _notes(lm, out, draft)
            (draft / "README.md").write_text(model_card(lm, plan, card or {}, notes), encoding="utf-8")
            if tokenizer is not None:
                tokenizer.save_pretrained(draft)
                complete_tokenizer(draft, tokenizer)
            _verify(draft, lm, out)
            put_in_place(draft, target)
    return target


def keep_unverified(lm: PreTrainedModel, target: Path, reason: str) -> ExportError:
    """Write the weights of a model that cannot be exported, as they are; the error says where they are now."""
    draft = make_draft(target)
    _save_raw(lm, draft)
    return _kept(draft, target, reason)


@contextmanager
def _kept_if_it_fails(target: Path) -> Iterator[Path]:
    """The directory to write in; whatever happens, what was written there stays, with the reason beside it."""
    draft = make_draft(target)
    try:
        yield draft
    except Exception as error:
        said = " ".join(str(error).split()).rstrip(".")
        reason = said if isinstance(error, ExportError | ConfigError) else f"{type(error).__name__}: {said}"
        raise _kept(draft, target, reason) from error
    except BaseException:
        _kept(draft, target, "the export was interrupted")
        raise


def _kept(draft: Path, target: Path, reason: str) -> ExportError:
    with suppress(OSError):  # the disk may be full
        reason_file(draft).write_text(f"This model was not exported to {str(target)!r}: {reason}.\n", encoding="utf-8")
    return ExportError(
        f"The model was not exported to {str(target)!r}: {reason}; what was written is kept at {str(draft)!r}, with "
        f"the reason in {reason_file(draft).name!r} beside it."
    )


def _save(out: Outgoing, lm: PreTrainedModel, draft: Path) -> None:
    """Write weights and configs; where `transformers` will not, the plain weights."""
    try:
        out.model.save_pretrained(draft)
    except Exception:
        _save_raw(lm, draft)
        raise


def _save_raw(lm: PreTrainedModel, draft: Path) -> None:
    """All weights and buffers under their own names in one file of PyTorch's, and the config."""
    torch.save({name: _on_host(value) for name, value in lm.state_dict().items()}, draft / "pytorch_model.bin")
    lm.config.to_json_file(draft / "config.json", use_diff=False)


def _on_host(value: object) -> object:
    return value.cpu() if isinstance(value, Tensor) else value


def _verify(draft: Path, lm: PreTrainedModel, out: Outgoing) -> None:
    """Verify on the model's device; where it has no memory left, on the CPU."""
    try:
        verify_export(draft, lm, out)
    except torch.OutOfMemoryError:
        if lm.device.type == "cpu":
            raise
        with _on_cpu(lm):
            verify_export(draft, lm, outgoing(lm))


@contextmanager
def _on_cpu(lm: PreTrainedModel) -> Iterator[None]:
    """The model's weights and buffers on the CPU for a while; those on its device stay what optimizers know."""
    tensors = [(tensor, tensor.data) for tensor in (*lm.parameters(), *lm.buffers())]
    try:
        for tensor, data in tensors:
            tensor.data = data.cpu()
        yield
    finally:
        for tensor, data in tensors:
            tensor.data = data


def _notes(lm: PreTrainedModel, out: Outgoing, draft: Path) -> list[str]:
    """What the model card says beyond the model: a sentence each."""
    notes = [*out.notes]
    if getattr(lm.config, "output_router_logits", False):
        notes.append(
            "It was trained with `output_router_logits`, which the config leaves out, since `generate` fails with it; "
            "set it to train on with the load-balancing loss."
        )
    main = main_dtype(out.model)
    others = {n: p.dtype for n, p in out.model.named_parameters() if p.is_floating_point() and p.dtype != main}
    if others:
        name, dtype = next(iter(others.items()))
        widest = str(reduce(torch.promote_types, others.values(), main))
        note = (
            f"{len(others)} of the weights (such as `{name}`, {dtype}) are stored in another dtype than the others "
            f"({main}). `from_pretrained` loads all in one, that of the config: load with `dtype={widest}` to have "
            "them exactly."
        )
        rank_zero_warn(note)
        notes.append(note)
    return [*notes, requirement(draft)]


@contextmanager
def _as_exported(lm: PreTrainedModel, dtype: torch.dtype | None) -> Iterator[None]:
    """Put a model, for a while, into what is written: eval mode, weights in `dtype`, cache on, ties as they are."""
    configs = (lm.config, lm.config.get_text_config())
    stated = [
        (config, name, getattr(config, name)) for config in configs for name in _CONFIG_FIELDS if hasattr(config, name)
    ]
    generation = getattr(lm, "generation_config", None)
    try:
        state_tie(lm.config, is_tied(lm))
        for config, name, _ in stated:
            if name == "use_cache":
                config.use_cache = True
        if generation is not None:
            lm.generation_config = _saveable(generation)
        with evaluating(lm), nullcontext() if dtype is None else in_dtype(lm, dtype):
            yield
    finally:
        for config, name, value in stated:
            setattr(config, name, value)
        if generation is not None:
            lm.generation_config = generation
