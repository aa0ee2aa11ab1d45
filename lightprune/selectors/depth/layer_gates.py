"""Learned layer gates: stage 1 of TRSP and ELDeR (arXiv 2505.18232)."""

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from lightprune.errors import ConfigError, check_choice, check_number
from lightprune.masks.gates import Bypass, Placement, attach_gate, remove_all
from lightprune.pipeline import Status
from lightprune.pipeline.steps import Steps
from lightprune.selectors.base import LayerSelector, lowest
from lightprune.strategies import adam_on

STEPS_PER_ROUND = 20


class LayerGateSelector(LayerSelector):
    """Learns a scalar gate for every layer under an l1 penalty and drops, round by round, the layers it closes most.

    In a round the gates s_l, which start at 1, learn by Adam on `LM loss + l1 * sum_l |s_l|`; at its end the layers
    with the smallest |s_l| are left out for good, and the next round learns the gates of the rest (TRSP, stage 1:
    one layer a round, since a choice made all at once is much worse).

    Args:
        drop: how many layers go.
        rounds: over how many rounds; None is one layer a round, 1 is all at once.
        steps_per_round: optimizer steps a round, 20 where neither this nor `stop` is given.
        start: the optimizer step at which the first round begins.
        lr: Adam's learning rate for the gates.
        l1: strength of the l1 penalty, lambda_1, against a loss in nats per token; the default is the paper's. Ten
            times as much was measured worse (`benchmarks/depth.py`).
        placement: what a gate scales: "residual", the layer's branch X_in + s * (f(X_in) - X_in), so that a closed
            gate is the layer left out; or "output", the whole output s * X_out, as the paper draws it. There the last
            layer's gate is free to shrink, since the final norm undoes it, and must be protected.
        restart: put the gates back to 1 at the start of every round.
        patience: end a round early once the layers it would drop have been the same for so many steps; None waits
            for every round's end. The window then closes early too, and what follows starts early.
        protect_first: how many of the first layers may not go.
        protect_last: how many of the last layers may not go; at least 1 with the placement "output".
        hold_weights: freeze the model's weights in the window (TRSP's setting); False trains them along.
        stop: in place of `steps_per_round`, the optimizer step by which the last round ends: the rounds share the steps
            from `start` to it evenly. Steps may be shares of the run, such as "30%" (`lightprune.pipeline.steps`).
    """

    alters = True
    step_settings = ("start", "stop", "steps_per_round")
    steps_per_round: int
    hooks_layers = True

    def __init__(
        self,
        drop: int,
        rounds: int | None = None,
        steps_per_round: Steps | None = None,
        start: Steps = 0,
        lr: float = 0.02,
        l1: float = 5e-3,
        placement: Placement = "residual",
        restart: bool = True,
        patience: int | None = None,
        protect_first: int = 0,
        protect_last: int = 0,
        hold_weights: bool = True,
        stop: Steps | None = None,
    ) -> None:
        if steps_per_round is not None and stop is not None:
            raise ConfigError(
                f"LayerGateSelector.steps_per_round is {steps_per_round} and LayerGateSelector.stop is {stop}: give "
                "one of them, and set the other to null."
            )
        vars(self).update(steps_per_round=STEPS_PER_ROUND if steps_per_round is stop is None else steps_per_round)
        self.rounds = drop if rounds is None else rounds
        super().__init__(
            drop=drop,
            start=start,
            stop=0 if stop is None else stop,
            protect_first=protect_first,
            protect_last=protect_last,
            hold_weights=hold_weights,
        )
        self.lr = lr
        self.l1 = l1
        self.placement: Placement = placement
        self.restart = restart
        self.patience = patience
        self._forget()

    def _forget(self) -> None:
        """Return to the state before the first round."""
        self._gates = torch.empty(0)
        self._adam: torch.optim.Adam | None = None
        self._saved: dict[str, Any] | None = None
        self._history: list[dict[str, Any]] = []
        self._round_steps = 0
        self._stable_steps = 0
        self._smallest: list[int] = []

    def resolve_steps(self, max_steps: int) -> None:
        super().resolve_steps(max_steps)
        for key in ("drop", "rounds", "start", "stop"):  # here, for these are divided and multiplied below
            check_number(self, key, getattr(self, key), whole=True, optional=key == "rounds")
        check_number(self, "steps_per_round", self.steps_per_round, whole=True, optional=True)
        if self.steps_per_round is None:
            between = self.stop - self.start
            if not self.rounds <= between:
                raise ConfigError(
                    f"LayerGateSelector has {between} steps from `start` to `stop` for {self.rounds} rounds: set "
                    f"`stop` to at least {self.start + self.rounds}, choose fewer `rounds`, or raise trainer.max_steps."
                )
            self.steps_per_round = between // max(self.rounds, 1)
        self.stop = self.start + self.rounds * self.steps_per_round

    def check_settings(self) -> None:
        super().check_settings()
        check_number(self, "l1", self.l1, least=0)
        check_number(self, "lr", self.lr, above=0)
        check_number(self, "steps_per_round", self.steps_per_round, whole=True, least=1)
        check_number(self, "patience", self.patience, whole=True, least=1, optional=True)
        check_choice(self, "placement", self.placement, get_args(Placement))

    def check(self) -> None:
        if not 1 <= self.rounds <= self.drop:
            raise ConfigError(
                f"LayerGateSelector.rounds is {self.rounds}: it must be from 1 to drop={self.drop}, or null."
            )
        if self.placement == "output" and self.protect_last < 1:
            raise ConfigError(
                "LayerGateSelector.protect_last is 0 with placement=output: the final norm undoes the last layer's "
                "gate, which would close first; set protect_last to at least 1, or placement=residual."
            )
        super().check()

    @property
    def skips_layers(self) -> bool:
        return not self.hold_weights

    @property
    def round(self) -> int:
        """The current round, from 0."""
        return len(self._history)

    @property
    def remaining(self) -> list[int]:
        """The layers that still have a gate."""
        dropped = self._dropped
        return [index for index in self.candidates if index not in dropped]

    @property
    def _dropped(self) -> list[int]:
        return [index for entry in self._history for index in entry["dropped"]]

    def watch(self) -> None:
        if self._adam is None:
            self._start_gates()
        self._attach()

    def penalty(self) -> Tensor | None:
        if not self.open or not self.l1:
            return None
        return self.l1 * self._gates[self.remaining].abs().sum()

    def optimizer_step(self) -> None:
        """One step of Adam on the gates."""
        if not self.open or self._adam is None:
            return
        self.pipeline.adapter.optimizer_step(self._adam, held=self.pipeline.weights.held)
        self._round_steps += 1
        if self.patience is not None:  # ranking waits for the device
            smallest = self._smallest_gates()
            self._stable_steps = self._stable_steps + 1 if smallest == self._smallest else 0
            self._smallest = smallest
        if self._round_is_over() and not self.pipeline.module.automatic_optimization:
            self._end_round()  # the batch may have further steps

    def advance(self, step: int) -> None:
        if self.open and self._round_is_over():
            self._end_round()
        super().advance(step)

    def settled(self) -> bool:
        return self.round == self.rounds

    def choose_layers(self) -> tuple[list[int], dict[str, Any]]:
        while self.round < self.rounds:  # the window opened late, behind a cut
            self._end_round()
        trained = [entry["gates"].values() for entry in self._history if entry["steps"]]
        if trained and all(gate == 1.0 for gates in trained for gate in gates):
            raise self.seen_nothing()
        return self._dropped, {
            "rounds": self._history,
            "placement": self.placement,
            "l1": self.l1,
            "lr": self.lr,
            "steps_per_round": self.steps_per_round,
        }

    def status(self) -> Status:
        if not self.open:
            return super().status()
        remaining = self._gates.detach()[self.remaining].abs()
        return {"round": f"{self.round + 1}/{self.rounds}", "gate_min": float(remaining.min())}

    def _quota(self) -> int:
        """How many layers this round drops: the quota split evenly, larger shares first."""
        share, extra = divmod(self.drop, self.rounds)
        return share + (self.round < extra)

    def _smallest_gates(self) -> list[int]:
        return lowest(self._gates.detach().abs(), self.remaining, self._quota())

    def _round_is_over(self) -> bool:
        patient = self.patience is None or self._stable_steps < self.patience
        return self.round < self.rounds and (self._round_steps >= self.steps_per_round or not patient)

    def _end_round(self) -> None:
        dropped = self._smallest_gates()
        values = self._gates.detach().tolist()
        seen = {index: values[index] for index in self.remaining}
        self._history.append(
            {"steps": self._round_steps, "dropped": dropped, "gates": {str(i): v for i, v in seen.items()}}
        )
        self.pipeline.log({f"select/gate/layer_{i:02d}": value for i, value in seen.items()})
        self._round_steps = self._stable_steps = 0
        self._smallest = []
        remove_all(self._handles)
        if self.restart:
            self._start_gates()
        self._attach()

    def _start_gates(self) -> None:
        device = self.pipeline.lm.device
        self._gates = torch.ones(self.pipeline.anatomy.num_layers, device=device, requires_grad=True)
        self._adam = adam_on(device, [self._gates], lr=self.lr)
        if self._saved is not None:
            self._gates.data.copy_(self._saved["gates"])
            self._adam.load_state_dict(self._saved["adam"])
            self._saved = None

    def _attach(self) -> None:
        layers = self.pipeline.anatomy.layers
        self._handles += [Bypass(layers[index], index) for index in self._dropped]
        self._handles += [attach_gate(layers[index], self._gates, index, self.placement) for index in self.remaining]

    def scores_state(self) -> dict[str, Any]:
        if self._saved is not None:  # loaded, and not yet attached
            return self._saved
        if self.plan is not None or self._adam is None:
            return {}
        return {
            "gates": self._gates.detach().clone(),
            "adam": self._adam.state_dict(),
            "history": self._history,
            "round_steps": self._round_steps,
            "stable_steps": self._stable_steps,
            "smallest": self._smallest,
        }

    def load_scores_state(self, state: Mapping[str, Any]) -> None:
        self._forget()
        if "gates" in state:
            self._saved = dict(state)
            self._history, self._smallest = state["history"], state["smallest"]
            self._round_steps, self._stable_steps = state["round_steps"], state["stable_steps"]
