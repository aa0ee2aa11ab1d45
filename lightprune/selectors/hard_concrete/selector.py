"""Hard-concrete masks: pruning to an exact shape while the weights train (Sheared LLaMA, DRPruning)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightprune.anatomy import Shape, Structure
from lightprune.errors import ConfigError, check_number
from lightprune.importance.ranking import rounded
from lightprune.integrations.lightning import logs_now
from lightprune.masks.figure import mask_figure
from lightprune.masks.soft_masks import UnitValues, Values
from lightprune.pipeline import Status
from lightprune.pipeline.steps import Steps
from lightprune.plan import PruningPlan
from lightprune.selectors.base import Selector
from lightprune.selectors.counts import Counts, Keep, serving_advice
from lightprune.selectors.hard_concrete.mask_set import MaskSet
from lightprune.selectors.hard_concrete.parameters import shape_of_budget
from lightprune.strategies import adam_on
from lightprune.surgery import expected_parameters, parameters_in_shape

BETAS = (0.9, 0.95)  # of Sheared LLaMA and DRPruning
MOST_POINTS = 512  # of the history that is plotted


# Of each structure, the expected share of closed masks, and the one that is asked for.
Sparsities = dict[str, tuple[float, float]]


class _Draw(NamedTuple):
    """The masks of one training batch: `values`, computed from the logits, and the leaves that the model uses."""

    batch: int
    values: Values
    leaves: Values


class HardConcreteSelector(Selector):
    """Learns a mask for every unit while the weights train, until exactly as many are open as the target shape has.

    A mask z in [0, 1] is hard-concrete (`lightprune.masks.hard_concrete`). For each structure with target sparsity t
    and expected sparsity s, the Lagrangian mean over layers of lambda_1 (s - t) + lambda_2 (s - t)^2 joins the loss.
    The masks' logits descend and the multipliers ascend, in one Adam; t rises linearly from 0 (Sheared LLaMA, arXiv
    2310.06694, section 2.1; DRPruning, arXiv 2411.14055).

    Every training batch draws masks of its own. In evaluation they are deterministic, with as many open as the target
    of the moment says. At `stop` the plan keeps the highest logits, as many in every layer, and the masks stand still.
    The cut writes their values into the weights: the cut model computes what the masked one did. What a mask scales is
    said at `lightprune.masks.soft_masks.UnitValues`. The target is given by counts or ratios of what **stays**, or as a
    budget of parameters that all `structures` share by one ratio.

    Args:
        stop: the optimizer step at which the plan is made.
        layers: layers that stay, a count or a ratio; None keeps all.
        heads: query heads a layer that stay, the same number in every key-value group.
        kv_groups: key-value heads a layer that stay, each with its query heads.
        channels: MLP channels a layer that stay.
        hidden: hidden dimensions that stay.
        parameters: in place of counts, how many parameters the model may have at most, or a ratio in (0, 1) of what it
            has. See `lightprune.selectors.budget`.
        structures: what shrinks to meet `parameters`; None is all that the model's family can be pruned in.
        multiple_of: channels and hidden dimensions are rounded to the nearest multiple of this, unless they are counts.
        start: the optimizer step at which the window opens.
        lr: learning rate of the logits.
        multiplier_lr: learning rate of the multipliers.
        warmup: the share of the window in which the target sparsity rises to its end.
        seed: of the masks' noise.
        hold_weights: let the module's weights stand still in the window.
    """

    alters = True
    folds = True

    def __init__(
        self,
        stop: Steps,
        layers: Keep = None,
        heads: Keep = None,
        kv_groups: Keep = None,
        channels: Keep = None,
        hidden: Keep = None,
        parameters: int | float | None = None,
        structures: Sequence[Structure] | None = None,
        multiple_of: int = 64,
        start: Steps = 0,
        lr: float = 1.0,
        multiplier_lr: float = 1.0,
        warmup: float = 0.2,
        seed: int = 0,
        hold_weights: bool = False,
    ) -> None:
        super().__init__(start, stop, hold_weights)
        self.counts = Counts(type(self).__name__, heads, kv_groups, channels, hidden, multiple_of, layers)
        self.parameters = parameters
        self.sharing = structures  # the budget of `parameters`; the property `structures` is what is decided about
        self.lr = lr
        self.multiplier_lr = multiplier_lr
        self.warmup = warmup
        self.seed = seed
        self._history: list[tuple[int, Sparsities]] = []
        self._seen: list[tuple[int, Tensor]] = []  # points of the history that nobody has read off the device yet
        self._target_sparsity = 0.0
        self._noted: int | None = None
        self._shapes: dict[Shape, Shape] = {}  # what a budget comes to, by what it shrinks
        self._drawn_to: Path | None = None
        self._saved: Mapping[str, Any] | None = None
        self._forget()

    def _forget(self) -> None:
        self._masks: MaskSet | None = None
        self._adam: torch.optim.Adam | None = None
        self._units: UnitValues | None = None
        self._draw: _Draw | None = None

    @property
    def structures(self) -> frozenset[Structure]:
        chosen: set[Structure]
        if self.parameters is None:
            chosen = set(self.counts.units)
            if self.counts.layers is not None:
                chosen.add("layers")
        elif self.sharing is None:
            chosen = set(self.pipeline.anatomy.family.structures)
        else:
            chosen = set(self.sharing)
        attention: set[Structure] = {"heads", "kv_groups"}  # who decides about one decides about both
        if chosen & attention:
            chosen |= attention
        return frozenset(chosen)

    @property
    def sparsity(self) -> float:
        """The share of the model's parameters that the masks are expected to remove now."""
        if self.plan is not None:
            return self.target_sparsity
        if self._masks is None:
            return 0.0
        return 1 - self._expected() / self.pipeline.anatomy.num_parameters

    @property
    def target_sparsity(self) -> float:
        """The share of the model's parameters that the target shape lacks."""
        return self._target_sparsity

    @property
    def skips_layers(self) -> bool:  # asked before the model is there
        if self.parameters is None:
            return self.counts.layers is not None
        return self.sharing is None or "layers" in self.sharing

    def check_settings(self) -> None:
        super().check_settings()
        check_number(self, "lr", self.lr, above=0)
        check_number(self, "multiplier_lr", self.multiplier_lr, above=0)
        check_number(self, "warmup", self.warmup, least=0, most=1)
        check_number(self, "seed", self.seed, whole=True, least=0)

    def check(self) -> None:
        super().check()
        source = self.expected_source()
        if source is None:
            return
        anatomy = self.pipeline.anatomy
        target = self.target(source)
        for advice in serving_advice(source, target):
            rank_zero_warn(f"HardConcreteSelector: {advice}")
        self._target_sparsity = 1 - parameters_in_shape(anatomy, target) / parameters_in_shape(anatomy, source)

    def target(self, source: Shape) -> Shape:
        if self.parameters is None:
            if self.sharing is not None:
                raise ConfigError(
                    f"HardConcreteSelector.structures is {list(self.sharing)} without `parameters`: set `parameters` "
                    "to the budget that they share, or leave `structures` out."
                )
            if not self.counts.units and self.counts.layers is None:
                raise ConfigError(
                    "HardConcreteSelector selects nothing: set at least one of `layers`, `heads`, `kv_groups`, "
                    "`channels` and `hidden`, or `parameters` in place of them."
                )
            shape = self.counts.of(source)
        else:
            if source not in self._shapes:
                if self.counts.units or self.counts.layers is not None:
                    raise ConfigError(
                        f"HardConcreteSelector.parameters is {self.parameters}, and counts are set beside it: leave "
                        "out either `parameters`, or `layers`, `heads`, `kv_groups`, `channels` and `hidden`."
                    )
                check_number(self, "multiple_of", self.counts.multiple_of, whole=True, least=1)
                self._shapes[source] = shape_of_budget(
                    self.pipeline.anatomy, source, self.parameters, self.sharing, self.counts.multiple_of
                )
            shape = self._shapes[source]
        if shape == source:
            raise ConfigError("HardConcreteSelector removes nothing: lower one of its counts, or `parameters`.")
        return shape

    def watch(self) -> None:
        self._prepare()
        anatomy = self.pipeline.anatomy
        # A module may call the two by themselves; a head that is the embedding takes masks too.
        for module in (anatomy.decoder, anatomy.head):
            self._handles += [
                module.register_forward_pre_hook(self._before_forward),
                module.register_forward_hook(self._after_forward, always_call=True),
            ]
        self._attach(self._progress(self.pipeline.step))

    def advance(self, step: int) -> None:
        super().advance(step)
        if self.cycle is not self.pipeline.cycle:
            return
        if self.open:
            self._note(step)
        elif self.plan is not None and not self.cycle.done and self._units is None:
            self._prepare()
            self._attach(1.0)  # decided, and waiting for the cut

    def penalty(self) -> Tensor | None:
        if not self.open or self._masks is None:
            return None
        return self._masks.penalty(self._progress(self.pipeline.step))

    def optimizer_step(self) -> None:
        """One step of Adam, down for the logits and up for the multipliers."""
        if not self.open or self._masks is None or self._adam is None:
            return
        self._collect()
        self.pipeline.adapter.optimizer_step(self._adam, held=self.pipeline.weights.held)
        self._masks.clamp()

    def choose(self) -> PruningPlan:
        masks = self._masks
        assert masks is not None, "the window has opened"
        if self._adam is None or not self._adam.state:
            raise self.seen_nothing()
        return masks.plan(
            self.pipeline.anatomy,
            lr=self.lr,
            multiplier_lr=self.multiplier_lr,
            warmup=self.warmup,
            parameters=self.parameters,
            seed=self.seed,
            sparsity={s: rounded(share) for s, share in zip(masks.logits, masks.sparsities().cpu(), strict=True)},
            logits={structure: rounded(values.detach()) for structure, values in masks.logits.items()},
        )

    def fold(self) -> None:
        if self._units is not None:
            self._units.fold(self.pipeline.adapter.edited)

    def detach(self) -> None:
        super().detach()
        self._units = self._draw = None

    def finish(self) -> None:
        self.detach()
        self._read_history()
        trainer = self.pipeline.trainer
        if self._history and self._drawn_to is None and trainer.is_global_zero and self.pipeline.fitting:
            others = [part for part in self.pipeline.selectors if isinstance(part, HardConcreteSelector)]
            name = "masks.png" if len(others) == 1 else f"masks-{self.start}.png"
            self._drawn_to = Path(trainer.default_root_dir) / name
            self._drawn_to.parent.mkdir(parents=True, exist_ok=True)
            mask_figure(self._history).savefig(self._drawn_to)

    def status(self) -> Status:
        if self.open:
            return {"sparsity": self.sparsity, "target": self.target_sparsity}
        if self.plan is None:
            return {}
        return {structure: self.plan.shape.count(structure) for structure in self.plan.structures}

    def scores_state(self) -> dict[str, Any]:
        if self._saved is not None:  # loaded, and not yet attached
            return dict(self._saved)
        self._read_history()
        learned: dict[str, Any] = {}
        if self._masks is not None and self._adam is not None and not self.cycle.done:
            learned = {"masks": self._masks.state_dict(), "adam": self._adam.state_dict()}
        return {"history": list(self._history), "target_sparsity": self._target_sparsity, **learned}

    def load_scores_state(self, state: Mapping[str, Any]) -> None:
        self._forget()
        self._seen = []
        self._history = [(step, dict(shares)) for step, shares in state["history"]]
        self._target_sparsity = state["target_sparsity"]
        self._saved = {key: value for key, value in state.items() if key != "plan"} if "masks" in state else None

    def _prepare(self) -> None:
        """Make the masks and their optimizer, or take them back from a checkpoint."""
        if self._masks is not None:
            return
        anatomy = self.pipeline.anatomy
        masks = self._masks = MaskSet(anatomy.shape, self.target(anatomy.shape), anatomy.lm.device)
        groups: list[dict[str, object]] = [
            {"params": list(masks.logits.values()), "lr": self.lr},
            {"params": [masks.multipliers], "lr": self.multiplier_lr, "maximize": True},
        ]
        self._adam = adam_on(anatomy.lm.device, groups, betas=BETAS)
        if self._saved is not None:
            masks.load_state_dict(self._saved["masks"])
            self._adam.load_state_dict(self._saved["adam"])
            self._saved = None

    def _attach(self, progress: float) -> None:
        assert self._masks is not None
        self._units = UnitValues(self.pipeline.anatomy, self._masks.deterministic(progress))
        self._handles.append(self._units)

    def _before_forward(self, module: nn.Module, inputs: tuple[object, ...]) -> None:
        assert self._masks is not None
        assert self._units is not None
        if not self.pipeline.training:
            self._units.set(self._masks.deterministic(self._progress(self.pipeline.step)))
            return
        batch = self.pipeline.trainer.fit_loop.epoch_loop.total_batch_idx
        if self._draw is None or self._draw.batch != batch:
            self._collect()
            values = self._masks.sampled(self.seed, batch)
            self._draw = _Draw(batch, values, values.leaves())
        if self._units.values is not self._draw.leaves:
            self._units.set(self._draw.leaves, known=False)

    def _after_forward(self, module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        # A pass on the side must not change what checkpointed layers recompute in the batch's backward.
        if self._draw is not None and self._units is not None and not self.pipeline.training:
            self._units.set(self._draw.leaves, known=False)

    def _collect(self) -> None:
        """Carry the gradients of the batch's masks to the logits.

        The model uses leaves, so that checkpointed layers may run their own backward passes up to these.
        """
        if self._draw is None:
            return
        pairs = [(values, leaf.grad) for values, leaf in self._draw.values.pairs(self._draw.leaves)]
        reached = [(values, gradient) for values, gradient in pairs if gradient is not None]
        if reached:
            values, gradients = zip(*reached, strict=True)
            torch.autograd.backward(values, gradients)
        self._draw = None

    def _progress(self, step: int) -> float:
        """The share of the target sparsity that is reached at an optimizer step."""
        rising = self.warmup * (self.stop - self.start)
        return min((step - self.start) / rising, 1.0) if rising else 1.0

    def _expected(self) -> float:
        """The parameters that the model is expected to keep; waits for the device."""
        assert self._masks is not None
        return expected_parameters(self.pipeline.anatomy, self._masks.probabilities())

    def _note(self, step: int) -> None:
        """Record the sparsities of this step for the history, and log them if the trainer logs now."""
        if step == self._noted or self._masks is None:
            return
        self._noted = step
        if (step - self.start) % math.ceil((self.stop - self.start) / MOST_POINTS) == 0:
            self._seen.append((step, self._masks.sparsities()))
        if self.pipeline.trainer.loggers and logs_now(self.pipeline.trainer):
            sparsities = dict(zip(self._masks.logits, self._masks.sparsities().tolist(), strict=True))
            targets = self._masks.targets(self._progress(step))
            self.pipeline.log(
                {
                    **{f"select/sparsity/{structure}": share for structure, share in sparsities.items()},
                    **{f"select/target/{structure}": share for structure, share in targets.items()},
                    "select/expected_parameters": self._expected(),
                }
            )

    def _read_history(self) -> None:
        """Move the records since the last time from the device into the history."""
        if not self._seen or self._masks is None:
            return
        first = self._seen[0][0]
        self._history = [point for point in self._history if point[0] < first]  # after a resume
        shares = torch.stack([of_step for _, of_step in self._seen]).tolist()
        for (step, _), of_step in zip(self._seen, shares, strict=True):
            targets = self._masks.targets(self._progress(step))
            self._history.append((step, {s: (share, targets[s]) for s, share in zip(targets, of_step, strict=True)}))
        self._seen = []
