"""What a run would cut, and what that would cost: one document of plain values, and that document for a terminal."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.table import Table

from lightprune.anatomy import Anatomy
from lightprune.costs import Workload, costs_of, obstacles
from lightprune.integrations.lightning import callbacks_of
from lightprune.pipeline import DecidingPart, Pipeline
from lightprune.pipeline.schedule import expected_shapes
from lightprune.plan import PruningPlan
from lightprune.reweighting import DomainReweighting

Document = dict[str, Any]


def forecast(pipeline: Pipeline, work: Workload | None = None) -> Document:
    """What a run would cut and when, and what that costs.

    Which units go does not matter for the counts and costs; where a selector knows already which layers go, the
    obstacles elsewhere are those of these layers.

    Args:
        pipeline: of a run that has not begun.
        work: what the model will be asked to do.

    Returns:
        Plain JSON values: `model`, `workload`, `shape`, `config` and `costs` (each "before" and "after"), `speedup`
        (by FLOPs for a prompt, by bytes for a generated token), `layers` that go (None if not known yet), `decisions`,
        `timeline` and `elsewhere`, what the shape loses in other tools.
    """
    work = work or Workload()
    anatomy = pipeline.anatomy
    source, *shapes = expected_shapes(pipeline.cycles, anatomy)
    whole, plan = PruningPlan.of(anatomy), PruningPlan.arriving_at(anatomy, shapes[-1])
    foreseen = [(selector, _foreseen(selector)) for selector in pipeline.selectors]
    known = next((layers for _, layers in foreseen if layers is not None), None)
    before, after = costs_of(anatomy, whole, work), costs_of(anatomy, plan, work)
    old, new = anatomy.lm.config.to_dict(), plan.config(anatomy).to_dict()
    return {
        "model": type(anatomy.lm).__name__,
        "workload": {**asdict(work), "dtype": str(work.dtype or anatomy.lm.dtype).removeprefix("torch.")},
        "shape": {"before": asdict(source), "after": asdict(shapes[-1])},
        "config": {name: {"before": old.get(name), "after": new[name]} for name in new if new[name] != old.get(name)},
        "costs": {"before": before.as_dict(), "after": after.as_dict()},
        "speedup": dict(zip(("prefill", "decode"), before.slower_than(after), strict=True)),
        "layers": None if known is None else list(known.dropped_layers),
        "decisions": [_decision(selector, layers) for selector, layers in foreseen],
        "timeline": list(_timeline(pipeline)),
        "elsewhere": _elsewhere(anatomy, known, plan),
    }


def shown(document: Document) -> Group:
    """The document for a terminal."""
    table = Table("", title=document["model"], title_justify="left")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for row in _rows(document):
        table.add_row(*row)
    timeline = Table("part", title="Timeline in optimizer steps", title_justify="left")
    timeline.add_column("from", justify="right")
    timeline.add_column("to", justify="right")
    for entry in document["timeline"]:
        timeline.add_row(entry["part"], entry["from"], entry["to"])
    return Group(table, *document["decisions"], *document["elsewhere"], timeline)


def _rows(document: Document) -> Iterator[tuple[str, str, str]]:
    shapes, costs, work = document["shape"], document["costs"], document["workload"]
    for name, count in shapes["before"].items():
        if name == "layers" or count != shapes["after"][name]:
            yield name, str(count), str(shapes["after"][name])
    before, after = costs["before"], costs["after"]
    share = after["parameters"] / before["parameters"] - 1
    yield "parameters", f"{before['parameters']:,}", f"{after['parameters']:,} ({share:+.1%})"
    for name, key, unit in (
        (f"weights, {work['dtype']}", "weights", "B"),
        ("KV cache of a token", "cache_per_token", "B"),
        (f"KV cache of {work['batch']} x {work['context']} tokens", "cache", "B"),
        (f"a prompt of {work['prompt']} tokens", "prefill", "FLOP"),
        (f"a token after {work['context']}", "decode", "FLOP"),
        ("read for such a token", "decode_bytes", "B"),
    ):
        yield name, scaled(before[key], unit), scaled(after[key], unit)
    yield "speed-up of a prompt, at best", "", f"{document['speedup']['prefill']:.2f}"
    yield "speed-up of a token, at best", "", f"{document['speedup']['decode']:.2f}"
    for name, values in document["config"].items():
        yield f"config.{name}", _brief(values["before"]), _brief(values["after"])


def _foreseen(selector: DecidingPart) -> PruningPlan | None:
    """The layers that a selector will take away, where that is known before training."""
    return selector.foresee() if selector.cycle.index == 0 and "layers" in selector.structures else None


def _elsewhere(anatomy: Anatomy, layers: PruningPlan | None, plan: PruningPlan) -> list[str]:
    # As long as it is not known which layers go, their kinds say nothing.
    config = anatomy.config if layers is None else layers.config(anatomy).get_text_config()
    return obstacles(config, plan.source, plan.shape)


def _decision(selector: DecidingPart, layers: PruningPlan | None) -> str:
    if layers is None:
        structures = ", ".join(sorted(selector.structures))
        return f"{type(selector).__name__} decides about {structures} at step {selector.stop}."
    return f"Layers that go: {', '.join(map(str, layers.dropped_layers))}."


def _timeline(pipeline: Pipeline) -> Iterator[dict[str, str]]:
    for part in pipeline.parts:
        yield _entry(type(part).__name__, *_steps(part.windows()))
    for callback in callbacks_of(pipeline.trainer):
        if isinstance(callback, DomainReweighting):
            stop = "end" if callback.stop is None else str(callback.stop)
            yield _entry(type(callback).__name__, str(callback.start), stop)
    steps, epochs = pipeline.trainer.max_steps, pipeline.trainer.max_epochs
    yield _entry("end of the run", str(steps) if steps != -1 else f"{epochs} epochs", "")


def _entry(part: str, start: str, stop: str) -> dict[str, str]:
    return {"part": part, "from": start, "to": stop}


def _steps(windows: Sequence[tuple[int, int | None]]) -> tuple[str, str]:
    """The steps from which and to which a part acts; a part that acts at one step has no end."""
    stops = ["end" if stop is None else str(stop) for start, stop in windows if stop != start]
    return ", ".join(str(start) for start, _ in windows), ", ".join(stops)


def scaled(number: int, unit: str) -> str:
    """A number with three digits and a prefix of the SI."""
    value, prefixes = float(number), iter(("", "k", "M", "G", "T", "P"))
    prefix = next(prefixes)
    while value >= 1000 and prefix != "P":
        value, prefix = value / 1000, next(prefixes)
    return f"{value:.3g} {prefix}{unit}"


def _brief(value: object) -> str:
    return f"{len(value)} entries" if isinstance(value, list) else str(value)
