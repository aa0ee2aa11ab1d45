"""Projected gates: heads and channels whose gates learn with exactly as many open as will stay (GRASPrune)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightprune.anatomy import Unit
from lightprune.errors import ConfigError, check_number
from lightprune.importance.ranking import highest_heads_mask, highest_mask
from lightprune.masks.gates import change_input, remove_all
from lightprune.pipeline import Status
from lightprune.plan import PruningPlan
from lightprune.selectors.width.activation import ActivationUnitSelector, Weighted
from lightprune.strategies import adam_on

BETAS = (0.9, 0.99)


class ProjectedGateSelector(ActivationUnitSelector):
    """Learns which heads and channels stay by gates of which, in every step, exactly as many are open as will stay.

    First the units are scored by their activations, as `ActivationUnitSelector` does, for `score_steps` steps. Each
    unit then has a score s, which begins with a channel's rank in its layer, from 0 to 1, or with what a head scores,
    over the highest of its layer. In every pass the highest are open, and all others closed, so the loss is that of a
    model of the shape that is asked for. The gradient with respect to a gate, open or closed, goes straight through to
    s, and Adam moves s; the weights stand still (GRASPrune, arXiv 2604.19398). Beside `Distillation` the loss is the
    divergence from the whole model.

    Hidden dimensions and layers are left to other selectors: a gate's slope says little about a whole layer
    (docs/measurements.md).

    Args:
        score_steps: optimizer steps for the scores by activations; the gates learn from then on to `stop`.
        lr: Adam's learning rate for s.
        settings: those of `ActivationUnitSelector`, without `hidden`.
    """

    alters = True

    def __init__(self, *, score_steps: int = 8, lr: float = 0.02, weighted: Weighted = True, **settings: Any) -> None:
        super().__init__(weighted=weighted, **settings)
        self.score_steps = score_steps
        self.lr = lr
        self._forget()

    def _forget(self) -> None:
        self._learned: dict[Unit, Tensor] = {}  # s of each unit [L, n]
        self._open: dict[Unit, Tensor] = {}  # 1 for those that are open now
        self._adam: torch.optim.Adam | None = None
        self._saved: Mapping[str, Any] | None = None

    def check_settings(self) -> None:
        super().check_settings()
        check_number(self, "score_steps", self.score_steps, whole=True, least=1)
        check_number(self, "lr", self.lr, above=0)
        if "hidden" in self.units:
            raise ConfigError(
                "ProjectedGateSelector is to cut hidden dimensions: it has gates for `heads`, `kv_groups` and "
                "`channels` alone. Leave it out, and add an ActivationUnitSelector with `hidden`."
            )
        if self.start + self.score_steps >= self.stop:
            raise ConfigError(
                f"ProjectedGateSelector.stop is {self.stop}, and its gates begin to learn at step "
                f"{self.start + self.score_steps}, after `score_steps`: set `stop` to at least "
                f"{self.start + self.score_steps + 1}."
            )

    @property
    def needs_backward(self) -> bool:
        return self.plan is None

    def watch(self) -> None:
        if self._saved is None:
            super().watch()
        else:
            self._begin({unit: scores.clone() for unit, scores in self._saved["learned"].items()})

    def advance(self, step: int) -> None:
        if self.open and not self._learned and self.start + self.score_steps <= step < self.stop:
            by_activation = super().scores()
            remove_all(self._handles)
            begin = {"channels": ranks, "heads": shares}
            self._begin({unit: begin[unit](scores) for unit, scores in by_activation.items()})
        super().advance(step)

    def _begin(self, learned: dict[Unit, Tensor]) -> None:
        device = self.pipeline.lm.device
        self._learned = {unit: scores.to(device, torch.float32).requires_grad_() for unit, scores in learned.items()}
        self._adam = adam_on(device, list(self._learned.values()), lr=self.lr, betas=BETAS)
        if self._saved is not None:
            self._adam.load_state_dict(self._saved["adam"])
            self._saved = None
        self._project()
        for unit in self._learned:
            for site in self._readers(unit):
                assert site.layer is not None
                self._handles.append(change_input(site.module, self._gated(unit, site.layer)))

    @torch.no_grad()
    def _project(self) -> None:
        """Open the units with the highest s, as many as will stay."""
        target = self.target(self.pipeline.anatomy.shape)
        for unit, scores in self._learned.items():
            self._open[unit] = (
                highest_heads_mask(scores, self.pipeline.anatomy.shape.heads_per_group, target)
                if unit == "heads"
                else highest_mask(scores, target.channels)
            )

    def _gated(self, unit: Unit, layer: int) -> Callable[[Tensor], Tensor]:
        rows = self._rows(unit)

        def change(activation: Tensor) -> Tensor:
            scores = self._learned[unit][layer]
            gate = self._open[unit][layer] + scores - scores.detach()
            return activation * gate.repeat_interleave(rows).to(activation.dtype)

        return change

    def optimizer_step(self) -> None:
        """One step of Adam on s."""
        if self.open and self._adam is not None:
            self.pipeline.adapter.optimizer_step(self._adam, held=self.pipeline.weights.held)
            self._project()

    def choose(self) -> PruningPlan:
        plan = super().choose()
        self._adam = None  # it is decided: nothing of this is needed any more
        return plan

    def scores(self) -> Mapping[Unit, Tensor]:
        if self._adam is None or not self._adam.state:
            raise self.seen_nothing()
        return {unit: scores.detach() for unit, scores in self._learned.items()}

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "score_steps": self.score_steps, "lr": self.lr}

    def detach(self) -> None:
        super().detach()
        if self.plan is None:
            self._saved = self._gate_state()
        self._learned, self._open, self._adam = {}, {}, None

    def status(self) -> Status:
        return {"gates": "learning"} if self._learned else super().status()

    def scores_state(self) -> dict[str, Any]:
        return {**super().scores_state(), "gates": self._gate_state()}

    def load_scores_state(self, state: Mapping[str, Any]) -> None:
        super().load_scores_state(state)
        self._forget()
        self._saved = state["gates"]

    def _gate_state(self) -> Mapping[str, Any] | None:
        if self._adam is None:
            return self._saved
        learned = {unit: scores.detach().clone() for unit, scores in self._learned.items()}
        return {"learned": learned, "adam": self._adam.state_dict()}


def ranks(scores: Tensor) -> Tensor:
    """The rank of every unit [L, n] in its layer, from 0 for the lowest up to (n - 1) / n."""
    order = torch.argsort(scores, dim=-1, stable=True)
    return torch.argsort(order, dim=-1).to(torch.float32) / scores.shape[-1]


def shares(scores: Tensor) -> Tensor:
    """Scores [L, n] over the highest of their layer: groups of them rank as they did."""
    return (scores / scores.amax(-1, keepdim=True).clamp(min=1e-30)).to(torch.float32)
