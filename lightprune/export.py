"""The model out: an ordinary Hugging Face directory, reloaded and compared before it takes its name."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lightprune.errors import ConfigError
from lightprune.finish import FinishingCallback
from lightprune.host import find_causal_lm
from lightprune.hub import Dtype, loading_problems, torch_dtype, without_progress_bars
from lightprune.pipeline import Pipeline
from lightprune.plan import PruningPlan
from lightprune.report import versions

# The largest difference of a logit, relative to the largest logit. Weights are compared exactly, whatever their dtype.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


class Card(TypedDict, total=False):
    """What a model card tells beyond the model and its plan; every entry may be left out.

    Attributes:
        parameters: how many the model had "before" the cut, and has "after" it.
        data: what the model was trained on, by name.
        metrics: for each moment ("before the cut", ...), metrics by name.
    """

    parameters: Mapping[str, int]
    data: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, float]]


class ExportHF(FinishingCallback):
    """Writes the model as a Hugging Face directory at the end of training, or of a resume that finds nothing to train.

    Works with any `LightningModule` that holds a Hugging Face causal LM. If a cut was planned and has not happened by
    the end of training, nothing is written.

    Args:
        path: the directory to write; it must not exist.
        overwrite: replace an earlier export at `path`, once the new one is verified.
        dtype: dtype of the exported weights; None keeps that of the model.
    """

    def __init__(self, path: str, overwrite: bool = False, dtype: Dtype | None = None) -> None:
        self.path = path
        self.overwrite = overwrite
        self.dtype = dtype
        self._last_validation: dict[str, float] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._last_validation = {}
        if stage == "fit":
            check_target(self.path, overwrite=self.overwrite)
            if self.dtype is not None:
                torch_dtype(self.dtype)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep what this validation logged: `trainer.callback_metrics` mixes it with what training logs."""
        if not trainer.sanity_checking:
            logged = trainer._logger_connector.metrics["log"]
            self._last_validation = {name: float(value) for name, value in logged.items()}

    def finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pipeline = Pipeline.of(trainer)
        if pipeline is not None and pipeline.cut is not None and not pipeline.cut.done:
            rank_zero_warn(f"Nothing is exported to {self.path!r}: training ended before the cut.")
            return
        if trainer.is_global_zero:
            target = export_hf(
                find_causal_lm(pl_module)[1],
                self.path,
                tokenizer=tokenizer_of(trainer, pl_module),
                plan=pipeline.plan if pipeline is not None else None,
                card=card_of(trainer, last_validation=self._last_validation),
                overwrite=self.overwrite,
                dtype=self.dtype,
            )
            rank_zero_info(f"Exported to {str(target)!r}, reloaded and compared.")
        trainer.strategy.barrier("lightprune.ExportHF")


def card_of(trainer: L.Trainer, *, last_validation: Mapping[str, float] | None = None) -> Card:
    """What a trainer knows about its run, for the model card.

    Args:
        last_validation: what the last validation logged, by name.
    """
    pipeline = Pipeline.of(trainer)
    cut = pipeline.cut if pipeline is not None else None
    metrics = {} if cut is None else {f"{moment} the cut": values for moment, values in cut.metrics.items()}
    data: dict[str, Any] = {"optimizer steps": trainer.global_step}
    domains = getattr(getattr(trainer, "datamodule", None), "domain_names", ())
    if domains:
        data["domains"] = ", ".join(domains)
    return Card(
        parameters=cut.parameters if cut is not None else {},
        data=data,
        metrics=metrics | {"last validation": last_validation or {}},
    )


def tokenizer_of(trainer: L.Trainer, module: L.LightningModule) -> PreTrainedTokenizerBase | None:
    """The `tokenizer` of the module or else of the data module; None if neither has one."""
    for owner in (module, getattr(trainer, "datamodule", None)):
        try:
            tokenizer = getattr(owner, "tokenizer", None)
        except ConfigError:  # a module whose source holds no tokenizer
            continue
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            return tokenizer
    return None


def check_target(path: str | Path, *, overwrite: bool) -> Path:
    """Where an export may go.

    Returns:
        `path` as a `Path`, with `~` expanded.

    Raises:
        ConfigError: it exists and `overwrite` is not set, or it exists and is no earlier export.
    """
    target = Path(path).expanduser()
    if target.exists() and not overwrite:
        raise ConfigError(
            f"The output {str(target)!r} exists already: choose another `path`, or set `overwrite: true` to replace it."
        )
    if target.exists() and not (target / "config.json").is_file():
        raise ConfigError(
            f"The output {str(target)!r} exists and is no Hugging Face model, so `overwrite` will not replace it: "
            "choose another `path`."
        )
    return target


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
    gave the logits of the model in memory. The model is as it was afterwards: mode, dtype, config.

    Args:
        lm: the model; gates and their hooks are off it.
        path: the directory to write.
        tokenizer: saved beside the model.
        plan: saved as `pruning_plan.json` and told in the model card.
        card: what else the model card tells.
        overwrite: replace an earlier export at `path`.
        dtype: dtype of the exported weights; None keeps that of the model.

    Raises:
        ConfigError: `path` is taken, or `dtype` is unknown.
        RuntimeError: the reloaded model is not the same; nothing is left at `path`.
    """
    target = check_target(path, overwrite=overwrite)
    weights_dtype = lm.dtype if dtype is None else torch_dtype(dtype)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        staged = Path(scratch, "model")
        with _as_exported(lm, weights_dtype), without_progress_bars():
            lm.save_pretrained(staged)
            if tokenizer is not None:
                tokenizer.save_pretrained(staged)
            if plan is not None:
                plan.save(staged / "pruning_plan.json")
            (staged / "README.md").write_text(model_card(lm, plan, card or {}), encoding="utf-8")
            verify_export(staged, lm)
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


def verify_export(path: Path, lm: PreTrainedModel) -> None:
    """Reload a directory as anyone would and compare it with the model in memory, which is in eval mode.

    Raises:
        RuntimeError: weights, ties or logits differ.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        dtype="auto",
        attn_implementation=lm.config._attn_implementation,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    reloaded, report = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    reloaded.to(lm.device)  # type: ignore[arg-type]
    differences = loading_problems(report) or _differences(reloaded, lm)
    if differences:
        raise RuntimeError(f"The export was discarded, since the reloaded model differs: {', '.join(differences)}.")


def _differences(reloaded: PreTrainedModel, lm: PreTrainedModel) -> list[str]:
    ours, theirs = lm.state_dict(), reloaded.state_dict()
    differing = [n for n in ours.keys() | theirs.keys() if not _equal(ours.get(n), theirs.get(n))]
    if differing:
        return [f"{len(differing)} weights (such as {min(differing)})"]
    if is_tied(reloaded) != is_tied(lm):
        return [f"its embeddings are {'' if is_tied(reloaded) else 'not '}tied"]
    _round_buffers(reloaded, lm)
    logits, expected = probe_logits(reloaded), probe_logits(lm)
    error = ((logits - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCE[lm.dtype]:  # NaN is an error too
        return [f"logits by {error:.1e} of the largest, where {TOLERANCE[lm.dtype]:.0e} is allowed"]
    return []


def _round_buffers(reloaded: PreTrainedModel, lm: PreTrainedModel) -> None:
    """Bring the rotary frequencies and the like to the dtype that training gave them.

    `bf16-true` rounds them, a reloaded model computes them anew in float32, and the logits show it.
    """
    ours = dict(lm.named_buffers())
    for name, buffer in reloaded.named_buffers():
        if name in ours:
            buffer.data = buffer.to(ours[name].dtype)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


def is_tied(lm: PreTrainedModel) -> bool:
    """Whether the output head is the input embedding: one tensor, whatever the config says."""
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head is not None and head.weight is embedding.weight


@torch.no_grad()
def probe_logits(lm: PreTrainedModel) -> Tensor:
    """Logits [2, T, V] in float32 for fixed tokens, T at most 16."""
    length = min(16, getattr(lm.config, "max_position_embeddings", 16))
    tokens = torch.arange(2 * length, device=lm.device).view(2, length) * 7919 % lm.config.vocab_size
    output: Any = lm(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    return cast(Tensor, output.logits.float())


@contextmanager
def _as_exported(lm: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Put a model, for a while, into what is written: eval mode, weights in `dtype`, KV cache on."""
    modes = [(module, module.training) for module in lm.modules()]
    weights = [(p, p.data) for p in lm.parameters() if p.is_floating_point()]
    configs = [c for c in (lm.config, getattr(lm, "generation_config", None)) if c is not None]
    caching = [(config, getattr(config, "use_cache", None)) for config in configs]
    config_dtype = lm.config.dtype
    try:
        lm.eval()  # type: ignore[no-untyped-call]
        # The parameters stay the same objects, so that ties hold and an optimizer does not notice.
        for parameter, data in weights:
            parameter.data = data.to(dtype)
        for config, use_cache in caching:
            if use_cache is False:
                config.use_cache = True
        yield
    finally:
        for parameter, data in weights:
            parameter.data = data
        for config, use_cache in caching:
            config.use_cache = use_cache
        lm.config.dtype = config_dtype
        for module, training in modes:
            module.training = training


def model_card(lm: PreTrainedModel, plan: PruningPlan | None, card: Card) -> str:
    """The README.md of an exported model: YAML front matter for the Hub, then Markdown."""
    base = _hub_name(lm)
    front = ["library_name: transformers", "pipeline_tag: text-generation"]
    front += [f"base_model: {base}"] if base else []
    front += ["tags:", "- lightprune", *(["- pruned"] if plan is not None else [])]
    what = f"[{base}](https://huggingface.co/{base})" if base else f"A {lm.config.model_type} model"
    sections = [
        "---\n" + "\n".join(front) + "\n---",
        f"# {base or lm.config.model_type}, " + ("pruned" if plan is not None else "finetuned"),
        f"{what}, {'made smaller' if plan is not None else 'trained'} with lightprune. An ordinary `transformers` "
        "checkpoint: `AutoModelForCausalLM.from_pretrained` loads it, and lightprune is not needed.",
        *_size_section(lm, plan, card.get("parameters", {})),
        *(_selection_section(plan) if plan is not None else []),
        *(["## Training", _table(("", ""), card["data"].items())] if card.get("data") else []),
        *_metrics_section(card.get("metrics", {})),
        "## Versions",
        _table(("", "version"), versions().items()),
    ]
    return "\n\n".join(sections) + "\n"


def _hub_name(lm: PreTrainedModel) -> str | None:
    """`org/name` if the model came from the Hub, as far as it still knows."""
    name = str(lm.name_or_path)
    parts = name.split("/")
    return name if len(parts) == 2 and all(parts) and " " not in name and not Path(name).exists() else None


def _size_section(lm: PreTrainedModel, plan: PruningPlan | None, parameters: Mapping[str, int]) -> list[str]:
    if plan is None:
        return ["## Size", f"{lm.num_parameters():,} parameters."]
    before, after = parameters.get("before"), parameters.get("after", lm.num_parameters())
    rows = [
        ("layers", plan.num_layers, len(plan.kept_layers)),
        ("parameters", "" if before is None else f"{before:,}", f"{after:,}"),
    ]
    return ["## Size", _table(("", "before", "after"), rows)]


def _selection_section(plan: PruningPlan) -> list[str]:
    settings = [(name, value) for name, value in plan.provenance.items() if isinstance(value, str | int | float | bool)]
    return [
        "## What was removed",
        f"Layers {', '.join(map(str, plan.dropped_layers)) or 'none'}, counted from 0. `pruning_plan.json` holds the "
        "plan and how it came about, scores included.",
        *([_table(("selection", ""), settings)] if settings else []),
    ]


def _metrics_section(metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    moments = {moment: values for moment, values in metrics.items() if values}
    if not moments:
        return []
    names = dict.fromkeys(name for values in moments.values() for name in values)
    rows = [(name, *(f"{v[name]:.4g}" if name in v else "" for v in moments.values())) for name in names]
    return ["## Metrics", _table(("", *moments), rows)]


def _table(header: tuple[str, ...], rows: Any) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines)
