"""The model card: what was removed, what it came to, and how it was trained."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from transformers import PreTrainedModel

from lightprune.anatomy import UNITS, Structure
from lightprune.callbacks.run_report import versions
from lightprune.costs import obstacles
from lightprune.plan import PruningPlan
from lightprune.surgery.stock_class import auto_class

_STRUCTURES: dict[Structure, str] = {
    "layers": "layers",
    "hidden": "hidden dimensions",
    "heads": "query heads",
    "kv_groups": "key-value groups",
    "channels": "MLP channels",
}


class Card(TypedDict, total=False):
    """What a model card tells beyond the model and its plan; every entry may be left out.

    Attributes:
        parameters: how many the model had "before" the cut, and has "after" it.
        data: what the model was trained on, by name.
        metrics: for each moment ("before the cut", ...), metrics by name.
    """

    parameters: Mapping[str, int]
    data: Mapping[str, object]
    metrics: Mapping[str, Mapping[str, float]]


def model_card(lm: PreTrainedModel, plan: PruningPlan | None, card: Card, notes: Sequence[str] = ()) -> str:
    """The README.md of an exported model: YAML front matter for the Hub, then Markdown.

    Args:
        lm: the model, cut.
        plan: what was cut; None if nothing was.
        card: what else to tell.
        notes: what the export did to the model: a sentence each, in Markdown.
    """
    base = _hub_name(lm)
    front = ["library_name: transformers", "pipeline_tag: text-generation"]
    front += [f"base_model: {base}"] if base else []
    front += ["tags:", "- lightprune", *(["- pruned"] if plan is not None else [])]
    what = f"[{base}](https://huggingface.co/{base})" if base else f"A {lm.config.model_type} model"
    sections = [
        "---\n" + "\n".join(front) + "\n---",
        f"# {base or lm.config.model_type}, " + ("pruned" if plan is not None else "finetuned"),
        f"{what}, {'made smaller' if plan is not None else 'trained'} with lightprune. An ordinary `transformers` "
        f"checkpoint: `{auto_class(lm.config).__name__}.from_pretrained` loads it, and lightprune is not needed.",
        *notes,
        *_size_section(lm, plan, card.get("parameters", {})),
        *(_selection_section(plan) if plan is not None else []),
        *_elsewhere_section(lm, plan),
        *(["## Training", _table(("", ""), card["data"].items())] if card.get("data") else []),
        *_metrics_section(card.get("metrics", {})),
        "## Versions",
        _table(("", "version"), versions().items()),
    ]
    return "\n\n".join(sections) + "\n"


def is_model_card(path: Path) -> bool:
    """Whether a file is one that `model_card` made."""
    return path.is_file() and "\n- lightprune\n" in path.read_text(encoding="utf-8", errors="replace")


def _hub_name(lm: PreTrainedModel) -> str | None:
    """`org/name` if the model came from the Hub and still holds that name."""
    name = str(lm.name_or_path)
    parts = name.split("/")
    return name if len(parts) == 2 and all(parts) and " " not in name and not Path(name).exists() else None


def _size_section(lm: PreTrainedModel, plan: PruningPlan | None, parameters: Mapping[str, int]) -> list[str]:
    if plan is None:
        return ["## Size", f"{lm.num_parameters():,} parameters."]
    before, after = parameters.get("before"), parameters.get("after", lm.num_parameters())
    rows = [(name, *(f"{s.count(unit):,}" for s in (plan.source, plan.shape))) for unit, name in _STRUCTURES.items()]
    rows.append(("parameters", "" if before is None else f"{before:,}", f"{after:,}"))
    return ["## Size", _table(("", "before", "after"), rows), "Heads, groups and channels are those of each layer."]


def _selection_section(plan: PruningPlan) -> list[str]:
    return [
        "## What was removed",
        f"{_removed(plan)} `pruning_plan.json` holds the plan and how it came about, scores included.",
        *(_table(("selection", ""), settings) for settings in map(_settings, _selections(plan.provenance)) if settings),
    ]


def _elsewhere_section(lm: PreTrainedModel, plan: PruningPlan | None) -> list[str]:
    """What the shape loses in other tools; nothing where it loses nothing."""
    found = [] if plan is None else obstacles(lm.config.get_text_config(), plan.source, plan.shape)
    return ["## In other tools", *found] if found else []


def _removed(plan: PruningPlan) -> str:
    """What goes, in sentences."""
    lost = {unit: f"{len(plan.removed(unit, 0))} of {plan.source.count(unit)} {_STRUCTURES[unit]}" for unit in UNITS}
    of_each_layer = [lost[unit] for unit in UNITS if unit in plan.structures and unit != "hidden"]
    sentences = []
    if plan.dropped_layers:
        sentences.append(f"Layers {', '.join(map(str, plan.dropped_layers))}, counted from 0.")
    if "hidden" in plan.structures:
        sentences.append(f"{lost['hidden']}.")
    if of_each_layer:
        sentences.append(f"In each layer, {', '.join(of_each_layer)}.")
    return " ".join(sentences) or "Nothing."


def _selections(provenance: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """How each selector came to its part of a plan: several may share a cut, and a run may have several cuts."""
    nested = [*provenance.get("cuts", ()), *provenance.get("parts", ())]
    return [selection for entry in nested for selection in _selections(entry)] if nested else [provenance]


def _settings(provenance: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in provenance.items() if isinstance(value, str | int | float | bool)]


def _metrics_section(metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    moments = {moment: values for moment, values in metrics.items() if values}
    if not moments:
        return []
    names = dict.fromkeys(name for values in moments.values() for name in values)
    rows = [(name, *(f"{v[name]:.4g}" if name in v else "" for v in moments.values())) for name in names]
    return ["## Metrics", _table(("", *moments), rows)]


def _table(header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines)
