"""The directory: written aside, verified, and only then given its name."""

import copy
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightprune.errors import ConfigError
from lightprune.export.card import Card, is_model_card, model_card
from lightprune.export.convert import outgoing
from lightprune.export.verify import verify_export
from lightprune.expressible import is_tied
from lightprune.host import check_causal_lm
from lightprune.hub import Dtype, torch_dtype, without_progress_bars
from lightprune.observe import evaluating
from lightprune.plan import PruningPlan

# What is written into a model's config for saving, and taken back.
_CONFIG_FIELDS = ("dtype", "architectures", "tie_word_embeddings", "use_cache")

# What of a `GenerationConfig` acts only where tokens are sampled, and only where beams are searched.
_FOR_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_FOR_BEAMS = ("early_stopping", "length_penalty")

# The files of an export: the model's, and those of all kinds of tokenizers.
_FILES = (
    "README.md",
    "pruning_plan.json",
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template.jinja",
    "additional_chat_templates",
)


def check_target(path: str | Path, *, overwrite: bool, key: str = "path") -> Path:
    """Where an export may go.

    Args:
        path: the directory to write.
        overwrite: whether an earlier export may be replaced.
        key: the setting that names it, for what errors say.

    Returns:
        `path` as a `Path`, with `~` expanded.

    Raises:
        ConfigError: it exists and `overwrite` is not set, it exists and is no earlier export or holds anything that an
            export does not write, or nothing can be there.
    """
    if not path:
        raise ConfigError(f"The output is {path!r}: name the directory to write in `{key}`.")
    try:
        target = Path(path).expanduser()
    except RuntimeError as error:  # the home of somebody unknown
        raise ConfigError(f"The output is {str(path)!r}, and there is no such home: choose another `{key}`.") from error
    above = next((parent for parent in target.absolute().parents if parent.exists()), target)
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ConfigError(
            f"The output {str(target)!r} cannot be made, since {str(above)!r} is no directory that one may write to: "
            f"choose another `{key}`."
        )
    if not os.path.lexists(target):
        return target
    if not overwrite:
        raise ConfigError(
            f"The output {str(target)!r} exists already: choose another `{key}`, or set `overwrite: true` to replace "
            "it."
        )
    if not is_model_card(target / "README.md"):
        raise ConfigError(
            f"The output {str(target)!r} exists and is no export of lightprune's, so `overwrite` will not replace it: "
            f"choose another `{key}`."
        )
    others = sorted(name for name in os.listdir(target) if not any(fnmatch(name, file) for file in _FILES))
    if others:
        raise ConfigError(
            f"The output {str(target)!r} holds {', '.join(map(repr, others))} beside an earlier export, so `overwrite` "
            f"will not replace it: choose another `{key}`."
        )
    return target


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
    """A copy without what has no effect and yet keeps `transformers` from saving, as in some models of the hub."""
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
    tokenizer: PreTrainedTokenizerBase | None = None,
    plan: PruningPlan | None = None,
    card: Card | None = None,
    overwrite: bool = False,
    dtype: Dtype | None = None,
) -> Path:
    """Write a model as a Hugging Face directory that plain `transformers` loads.

    The directory appears under its name only after it was reloaded with `AutoModelForCausalLM`, had every weight, and
    gave the logits of the model in memory. A model that its own class cannot hold goes out as another stock class that
    computes the same; the model card then says so. The model is as it was afterwards: class, weights, mode, config.

    Args:
        lm: the model; gates and their hooks are off it.
        path: the directory to write.
        tokenizer: saved beside the model.
        plan: saved as `pruning_plan.json` and told in the model card.
        card: what else the model card tells.
        overwrite: replace an earlier export at `path`.
        dtype: dtype of the exported weights; None keeps that of the model.

    Raises:
        ConfigError: `lm` is no model, `path` is taken, `dtype` is unknown, or no stock class can hold the model.
        RuntimeError: the reloaded model is not the same; nothing is left at `path`.
    """
    check_causal_lm(lm, "export_hf")
    target = check_target(path, overwrite=overwrite)
    weights_dtype = lm.dtype if dtype is None else torch_dtype(dtype)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        staged = Path(scratch, "model")
        with _as_exported(lm, weights_dtype), without_progress_bars():
            out = outgoing(lm)
            out.model.save_pretrained(staged)
            if tokenizer is not None:
                tokenizer.save_pretrained(staged)
            if plan is not None:
                plan.save(staged / "pruning_plan.json")
            (staged / "README.md").write_text(model_card(lm, plan, card or {}, out.notes), encoding="utf-8")
            verify_export(staged, lm, out)
        _replace(target, staged, keeping=Path(scratch, "replaced"))
    return target


def _replace(target: Path, new: Path, *, keeping: Path) -> None:
    """Give `new` the name `target`; what had that name goes to `keeping`, and comes back if this fails."""
    replaces = target.exists()
    if replaces:
        target.rename(keeping)
    try:
        new.rename(target)
    except OSError:
        if replaces:
            keeping.rename(target)
        raise


@contextmanager
def _as_exported(lm: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Put a model, for a while, into what is written: eval mode, weights in `dtype`, cache on, ties as they are."""
    weights = [(p, p.data) for p in lm.parameters() if p.is_floating_point()]
    stated = {name: getattr(lm.config, name) for name in _CONFIG_FIELDS if hasattr(lm.config, name)}
    generation = getattr(lm, "generation_config", None)
    try:
        lm.config.tie_word_embeddings = is_tied(lm)
        if "use_cache" in stated:
            lm.config.use_cache = True
        if generation is not None:
            lm.generation_config = _saveable(generation)
        # The parameters stay the same objects, so that ties hold and an optimizer does not notice.
        for parameter, data in weights:
            parameter.data = data.to(dtype)
        with evaluating(lm):
            yield
    finally:
        for parameter, data in weights:
            parameter.data = data
        for name, value in stated.items():
            setattr(lm.config, name, value)
        if generation is not None:
            lm.generation_config = generation
