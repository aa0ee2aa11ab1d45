"""`Recovery`: the learning rate of what is left."""

import math
from typing import Any, Literal, get_args

from lightprune.errors import ConfigError, check_choice, check_number
from lightprune.pipeline import PruningCallback, Stage, Status
from lightprune.pipeline.steps import Steps

Decay = Literal["constant", "linear", "cosine"]


class Recovery(PruningCallback):
    """A learning rate of its own for what is left, counted from the last cut.

    It warms up linearly to `lr`, then decays towards the end of the run, and overrides the user's scheduler from the
    cut on. Parameter groups keep the ratios of their rates: the group with the largest gets `lr`.

    Args:
        lr: the peak learning rate.
        warmup_steps: optimizer steps from the cut to the peak, or a share of the run such as "5%".
        decay: "constant", "linear" or "cosine", down to `final_ratio * lr` at `trainer.max_steps`.
        final_ratio: what is left of the peak at the end.
    """

    stage = Stage.RECOVER
    step_settings = ("warmup_steps",)
    warmup_steps: int
    needs_training = True

    def __init__(self, lr: float, warmup_steps: Steps = 0, decay: Decay = "constant", final_ratio: float = 0.1) -> None:
        self.lr = lr
        vars(self).update(warmup_steps=warmup_steps)  # a share until `resolve_steps`
        self.decay: Decay = decay
        self.final_ratio = final_ratio
        self._ratios: list[list[float]] | None = None

    def check_settings(self) -> None:
        check_number(self, "lr", self.lr, least=0)
        check_number(self, "warmup_steps", self.warmup_steps, whole=True, least=0)
        check_number(self, "final_ratio", self.final_ratio, least=0, most=1)
        check_choice(self, "decay", self.decay, get_args(Decay))

    def check(self) -> None:
        cut, max_steps = self.pipeline.cut, self.pipeline.trainer.max_steps
        if cut is None:
            raise ConfigError(
                "Recovery counts from the cut, and there is none: add a StructuredCut to trainer.callbacks."
            )
        left = max_steps - cut.at
        if max_steps != -1 and self.warmup_steps > left:
            raise ConfigError(
                f"Recovery.warmup_steps is {self.warmup_steps}, and from the cut at {cut.at} to trainer.max_steps "
                f"{max_steps} there are {left} steps: set it to at most {left}, or raise trainer.max_steps."
            )
        if self.decay != "constant" and max_steps == -1:
            raise ConfigError(
                f"Recovery.decay is {self.decay!r} and trainer.max_steps is -1: set trainer.max_steps, the step at "
                "which the decay ends, or Recovery.decay=constant."
            )

    def advance(self, step: int) -> None:
        cut = self.pipeline.cut
        if cut is None or cut.step is None:
            return
        trainer = self.pipeline.trainer
        own = [[_own_rate(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
        if self._ratios is None or [*map(len, self._ratios)] != [*map(len, own)]:  # groups may have lost all they had
            largest = max(rate for rates in own for rate in rates)
            self._ratios = [[rate / largest if largest else 1.0 for rate in rates] for rates in own]
        rate = self.lr * rate_factor(
            step - cut.step, trainer.max_steps - cut.step, self.warmup_steps, self.decay, self.final_ratio
        )
        for optimizer, ratios in zip(trainer.optimizers, self._ratios, strict=True):
            for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
                group["lr"] = rate * ratio

    def status(self) -> Status:
        rates = [group["lr"] for optimizer in self.pipeline.trainer.optimizers for group in optimizer.param_groups]
        return {} if self._ratios is None else {"lr": max(rates)}

    def state_dict(self) -> dict[str, Any]:
        return {"ratios": self._ratios}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._ratios = state_dict["ratios"]


def rate_factor(step: int, steps: int, warmup_steps: int, decay: Decay, final_ratio: float) -> float:
    """The share of the peak rate for the step that follows `step` others since the cut, out of `steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if decay == "constant":
        return 1.0
    done = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
    remaining = 1 - done if decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return final_ratio + (1 - final_ratio) * remaining


def _own_rate(group: dict[str, Any]) -> float:
    """The rate that the group was configured with, before any schedule."""
    return float(group.get("initial_lr", group["lr"]))
