"""What the regularizers of width share: which groups they act on, what they log, and what they refuse."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from transformers import PreTrainedModel

import lightprune as lp
from lightprune.anatomy import anatomy_of
from lightprune.regularizers.units import removed_groups
from tests.families import tiny_lm
from tests.regularizers.by_hand import REMOVED, SLICES, STAY, from_file, mean_of, plan_for
from tests.training import Plain, Spy, batches, fit

COUNTS = {"heads": 4, "kv_groups": 2, "channels": 48, "hidden": 32}


def share_of(name: str, lm: PreTrainedModel, unit: str) -> float:
    """Sums of squares, slice by slice: of the groups that go, and of all."""

    def squares(places: list[tuple[int, int]]) -> float:
        return sum(float(s.detach().square().sum()) for place in places for s in SLICES[name](lm, unit, *place, STAY))

    layers = (0,) if unit == "hidden" else STAY
    return squares(REMOVED[name][unit]) / squares([(layer, i) for layer in layers for i in range(COUNTS[unit])])


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_the_groups_are_those_of_the_units_that_go_from_layers_that_stay(name: str) -> None:
    """Each once: heads that go with their group are no groups of their own, and a lone head is no key-value group."""
    lm = tiny_lm(name)
    found: dict[str, list[tuple[int, int]]] = {}
    for group in removed_groups(anatomy_of(lm), plan_for(name, lm)):
        layer = 0 if group.unit == "hidden" else group.places[0].weight.layer
        found.setdefault(group.unit, []).extend((layer, i) for i in group.removed.nonzero().flatten().tolist())
    assert found == REMOVED[name]


@pytest.mark.parametrize(
    "part", [lp.GroupNormPenalty(5.0, start=1), lp.ProximalGroupLasso(start=1)], ids=lambda p: type(p).__name__
)
def test_the_share_left_is_logged_as_the_window_begins_at_intervals_and_at_the_cut(part: Any, tmp_path: Path) -> None:
    lm = tiny_lm()
    expected: dict[int, dict[str, float]] = {}

    def look(trainer: Any, module: Any) -> None:
        if trainer.global_step < 6:  # later there is nothing left to compare
            expected[trainer.global_step] = {unit: share_of("llama_tied", lm, unit) for unit in COUNTS}

    status = Spy(lambda *_: part.status(), "on_before_optimizer_step")
    parts = [Spy(look), status, from_file(plan_for("llama_tied", lm), tmp_path), part, lp.StructuredCut(at=5)]
    fit(Plain(lm), parts, batches(6), 6, logger=CSVLogger(tmp_path), log_every_n_steps=3)
    (written,) = tmp_path.rglob("metrics.csv")
    rows = {int(row["step"]): row for row in csv.DictReader(written.open()) if row["regularize/share/heads"]}
    assert sorted(rows) == [1, 3, 5]
    for step, row in rows.items():
        actual = {unit: float(row[f"regularize/share/{unit}"]) for unit in COUNTS}
        assert actual == pytest.approx(expected[step], rel=1e-4, abs=1e-9), step
    assert 0 < expected[1]["channels"] < 0.2
    # Before the window nothing, in it what was logged last, after the cut nothing again.
    shown = [{k.removesuffix("_share"): v for k, v in seen.items()} for seen in status.seen]
    assert shown[0] == shown[5] == {}
    for index, step in ((1, 1), (2, 1), (3, 3), (4, 3)):
        assert shown[index] == pytest.approx(expected[step], rel=1e-4)


def test_each_cycle_begins_anew(tmp_path: Path) -> None:
    """Two cuts of channels: the second penalty is relative to the cut model's weights, and acts on these."""
    lm = tiny_lm()
    first = plan_for("llama_tied", lm, "layers", "channels")
    smaller = tiny_lm(num_layers=5, intermediate_size=45)
    second = lp.PruningPlan.keeping(anatomy_of(smaller), channels=[range(5, 45)] * 5)
    (tmp_path / "second").mkdir()
    part = lp.GroupNormPenalty(0.5)
    seen: list[tuple[float, float]] = []

    def look(trainer: Any, module: Any) -> None:
        penalty = part.penalty()
        if penalty is None:
            assert trainer.global_step == 2
            return
        if trainer.global_step < 2:
            mean = mean_of("llama_tied", lm, "channels", "l2")
        else:
            mlps = [layer.mlp for layer in lm.model.layers]
            norms = []
            for mlp in mlps:
                for j in range(5):
                    rows = [p[j].flatten() for m in (mlp.gate_proj, mlp.up_proj) for p in m.parameters()]
                    norms.append(torch.cat([*rows, mlp.down_proj.weight[:, j]]).square().mean().sqrt())
            mean = torch.stack(norms).mean()
        seen.append((penalty.item(), mean.item()))

    callbacks = [
        Spy(look, "on_before_optimizer_step"),
        from_file(first, tmp_path),
        lp.StructuredCut(at=2),
        lp.PlanFromFile(from_file(second, tmp_path / "second").path, start=3),
        lp.StructuredCut(at=5),
        part,
    ]
    fit(Plain(lm), callbacks, batches(5), max_steps=5)
    for (penalty, mean), (_, reference) in zip(seen, [seen[0], seen[0], seen[2], seen[2]], strict=True):
        assert penalty == pytest.approx(0.5 * mean / reference, rel=1e-5)


def test_where_layers_alone_go_nothing_is_logged(tmp_path: Path) -> None:
    """Acting before every cut, it has nothing to do before this one."""
    callbacks = [
        lp.RandomSelector(drop=1),
        lp.GroupNormPenalty(),
        lp.StructuredCut(at=2, validate=False),
        lp.RandomUnitSelector(channels=20, start=3),
        lp.StructuredCut(at=5, validate=False),
    ]
    fit(Plain(), callbacks, batches(5), max_steps=5, logger=CSVLogger(tmp_path, name=""), log_every_n_steps=1)
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if not row.get("val/loss")]
    assert [row["step"] for row in rows if row["regularize/share/channels"]] == [row["step"] for row in rows] != []


LAYERS = "acts on heads or kv_groups or channels or hidden, and its selectors decide about layers"


@pytest.mark.parametrize(
    ("part", "units", "message"),
    [
        (lp.GroupNormPenalty(), ["layers"], f"GroupNormPenalty {LAYERS}"),
        (lp.ProximalGroupLasso(), ["layers"], f"ProximalGroupLasso {LAYERS}"),
        (
            lp.DifferencePenalty(),
            ["channels", "hidden"],
            "DifferencePenalty acts on layers, and its selectors decide about channels or hidden",
        ),
        (lp.GroupNormPenalty(strength=-1.0), ["channels"], "GroupNormPenalty.strength is -1.0: it must be at least 0"),
        (lp.ProximalGroupLasso(strength=-0.5), ["channels"], "ProximalGroupLasso.strength is -0.5: it must be"),
    ],
)
def test_refusals(part: Any, units: list[str], message: str, tmp_path: Path) -> None:
    lm = tiny_lm()
    callbacks = [from_file(plan_for("llama_tied", lm, *units), tmp_path), part, lp.StructuredCut(at=3)]
    with pytest.raises(lp.ConfigError, match=message):
        fit(Plain(lm), callbacks, batches(4), max_steps=4)
