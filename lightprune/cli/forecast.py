"""What a run would cut, for a terminal: shapes, changed fields of the model's config, timeline of steps."""

from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Group
from rich.table import Table

from lightprune.integrations.lightning import callbacks_of
from lightprune.pipeline import DecidingPart, Pipeline
from lightprune.pipeline.schedule import expected_shapes
from lightprune.plan import PruningPlan
from lightprune.reweighting import DomainReweighting
from lightprune.surgery import resulting_parameters


def forecast(pipeline: Pipeline) -> Group:
    """What a run would cut, for a terminal: shapes, changed fields of the model's config, timeline of steps."""
    anatomy = pipeline.anatomy
    source, *shapes = expected_shapes(pipeline.cycles, anatomy)
    # Which units go does not matter for the counts: a family's layers are all alike.
    plan = PruningPlan.arriving_at(anatomy, shapes[-1])
    before, after = anatomy.num_parameters, resulting_parameters(anatomy, plan)
    table = Table("", title=f"{type(anatomy.lm).__name__}", title_justify="left")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name, count in asdict(source).items():
        if name == "layers" or count != getattr(shapes[-1], name):
            table.add_row(name, str(count), str(getattr(shapes[-1], name)))
    table.add_row("parameters", f"{before:,}", f"{after:,} ({after / before - 1:+.1%})")
    old, new = anatomy.lm.config.to_dict(), plan.config(anatomy).to_dict()
    for name in (name for name in new if new[name] != old.get(name)):
        table.add_row(f"config.{name}", _brief(old.get(name)), _brief(new[name]))
    return Group(table, *map(_decision, pipeline.selectors), _timeline(pipeline))


def _decision(selector: DecidingPart) -> str:
    """What a selector will take away, as far as that is known before training."""
    plan = selector.foresee() if selector.cycle.index == 0 and "layers" in selector.structures else None
    if plan is None:
        return (
            f"{type(selector).__name__} decides about {', '.join(sorted(selector.structures))} at step {selector.stop}."
        )
    return f"Layers that go: {', '.join(map(str, plan.dropped_layers))}."


def _timeline(pipeline: Pipeline) -> Table:
    table = Table("part", title="Timeline in optimizer steps", title_justify="left")
    table.add_column("from", justify="right")
    table.add_column("to", justify="right")
    for part in pipeline.parts:
        table.add_row(type(part).__name__, *_steps(part.windows()))
    for callback in callbacks_of(pipeline.trainer):
        if isinstance(callback, DomainReweighting):
            stop = "end" if callback.stop is None else str(callback.stop)
            table.add_row(type(callback).__name__, str(callback.start), stop)
    steps, epochs = pipeline.trainer.max_steps, pipeline.trainer.max_epochs
    table.add_row("end of the run", str(steps) if steps != -1 else f"{epochs} epochs", "")
    return table


def _steps(windows: Sequence[tuple[int, int | None]]) -> tuple[str, str]:
    """The steps from which and to which a part acts; a part that acts at one step has no end."""
    stops = ["end" if stop is None else str(stop) for start, stop in windows if stop != start]
    return ", ".join(str(start) for start, _ in windows), ", ".join(stops)


def _brief(value: object) -> str:
    return f"{len(value)} entries" if isinstance(value, list) else str(value)
