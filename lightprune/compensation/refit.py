"""Closed-form compensation: projections refitted so that the cut model's residual stream stays that of the dense one.

From front to back (SlimGPT, arXiv 2412.18110, and ZipLM, arXiv 2302.04089, for width; ReplaceMe, arXiv 2505.02819, is
the case of one map in front of a removed run of layers): in each layer that stays, the projections onto the residual
stream are refitted on what the *smaller* model, as refitted so far, feeds into them, and towards the residual stream
that the *dense* model has at the same place. In front of a removed run of layers that is the place where the run ends.
With inputs X [N, k] of a projection, and E [N, d], what the stream lacks behind it, the change is

    B = argmin ||E - X B||^2 + lambda ||B||^2,    W <- W + B^T,

so the ridge pulls towards the weights that are there. lambda is chosen for each projection on tokens that are held out
of the fit, and a projection whose held-out error does not fall is left alone. Readers of a residual stream that loses
hidden dimensions are refitted towards their own outputs in the dense model.

Shapes: N tokens, B sequences, T tokens each, d hidden dimensions, k inputs of a projection.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightprune.anatomy import Anatomy
from lightprune.compensation.passes import Enough, Observed, Pending
from lightprune.compensation.projections import Projection, projections_of
from lightprune.compensation.replay import Replay
from lightprune.integrations.zero_params import Edited
from lightprune.masks.forward_passes import attention_mask_of, evaluating
from lightprune.masks.gates import remove_all
from lightprune.masks.unit_masks import UnitMasks
from lightprune.plan import PruningPlan
from lightprune.surgery.least_squares import Equations, NormalEquations, Refit, ScaleEquations, best_refit

STRENGTHS = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
"""The ridges that are tried, in units of the mean diagonal of X^T X."""


@dataclass(frozen=True)
class Refitted:
    """One projection that was fitted.

    Attributes:
        path: its name in the causal LM.
        strength: the ridge that was chosen; None where the projection was left alone.
        before: the mean squared error of its held-out tokens without the refit.
        after: the same with it.
    """

    path: str
    strength: float | None
    before: float
    after: float


@dataclass
class Calibration:
    """The batches to fit on, and how far both models have come with them.

    Attributes:
        replays: the layers of the decoder for each batch.
        masks: each batch's attention mask [B, T], or None.
        held_out: how many of the last batches choose the ridge and judge the refit, and are not fitted on.
        small: the residual stream [B, T, d] of the smaller model for each batch, float32; on the device if there is
            plenty of room, else on the host.
        dense: that of the dense model.
    """

    replays: list[Replay]
    masks: list[Tensor | None]
    held_out: int
    small: list[Tensor]
    dense: list[Tensor]

    def is_held_out(self, number: int) -> bool:
        """Whether batch `number` is held out."""
        return number >= len(self.replays) - self.held_out


class Compensation:
    """Refits the layers that a plan leaves, in the uncut model; the cut comes after.

    Args:
        anatomy: of the uncut model.
        plan: what stays.
        batches: what the decoder is called with, batch by batch: this rank's own.
        everywhere: whether every layer behind the first loss is refitted, or only those that lose units themselves and
            those in front of a removed run.
        held_out: how many of the last batches are held out.
        total: sums a tensor over all ranks.
        edited: gives the whole of a parameter, to be changed in place.
        progress: called after each layer.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        plan: PruningPlan,
        batches: Sequence[Mapping[str, Tensor]],
        *,
        everywhere: bool,
        held_out: int,
        total: Callable[[Tensor], Tensor],
        edited: Edited,
        progress: Callable[[], object],
    ) -> None:
        self._anatomy = anatomy
        self._plan = plan
        self._batches = batches
        self._everywhere = everywhere
        self._held_out = held_out
        self._total = total
        self._edited = edited
        self._progress = progress
        self._pending: list[Pending] = []

    @torch.no_grad()
    def run(self) -> list[Refitted]:
        """Refit all layers, from front to back."""
        with evaluating(self._anatomy.lm):
            self._masks = UnitMasks(self._anatomy, self._plan)
            try:
                return list(self._layers())
            finally:
                self._masks.remove()

    def _layers(self) -> Iterator[Refitted]:
        device = self._anatomy.lm.device
        batches = [{name: value.to(device) for name, value in batch.items()} for batch in self._batches]
        self._store = _store(device, batches, self._anatomy.shape.hidden)
        with self._small():
            small = [Replay.of(self._anatomy, batch).start for batch in batches]
        replays = [Replay.of(self._anatomy, batch) for batch in batches]
        tokens = Calibration(
            replays,
            [attention_mask_of(batch) for batch in batches],
            self._held_out,
            [self._stored(state) for state in small],
            [self._stored(replay.start) for replay in replays],
        )
        for replay in replays:
            replay.start = torch.empty(0)  # it is stored
        kept = [*self._plan.kept_layers, self._anatomy.num_layers]
        self._run_dense(tokens, range(kept[0]))
        lacking = kept[0] > 0 or bool(self._plan.removed("hidden", 0))
        for index, following in pairwise(kept):
            border = following > index + 1
            loses_units = any(self._plan.removed(unit, index) for unit in ("heads", "channels"))
            steps = projections_of(
                self._anatomy, self._plan, index, lacking=lacking, border=border, everywhere=self._everywhere
            )
            lacking = lacking or border or loses_units
            try:
                yield from self._refit_layer(tokens, index, steps, range(index + 1, following))
            finally:
                remove_all([*self._pending])
                self._pending = []
            self._progress()

    def _refit_layer(
        self, tokens: Calibration, index: int, steps: list[list[Projection]], removed: range
    ) -> Iterator[Refitted]:
        """Refit the steps of layer `index` in turn, write the changes, and move both models behind the layer.

        Both models are in front of the layer before. `removed` are the layers behind it that go.
        """
        before = list(tokens.dense)
        watched = [step[0] for step in steps if not step[0].ends_layer]
        goals = self._run_dense(tokens, range(index, removed.stop), watched)
        changes: list[tuple[Projection, Refit]] = []
        for step in steps:
            last = step[0].ends_layer
            goal = tokens.dense if last else goals.pop(0)
            for projection, (fit, held_out) in zip(
                step, self._equations(tokens, index, step, before, goal, last=last), strict=True
            ):
                refit = best_refit(fit, held_out, STRENGTHS)
                error = float(held_out.error(torch.zeros_like(held_out.xe)))
                path = f"{self._anatomy.family.layers}.{index}.{projection.path}"
                if refit is None:
                    yield Refitted(path, None, error, error)
                else:
                    yield Refitted(path, refit.strength, error, refit.after)
                    changes.append((projection, refit))
            self._pending += [Pending(p, r.change.float()) for p, r in changes[len(self._pending) :]]
        if removed.stop < self._anatomy.num_layers:  # else nothing follows
            with self._small():
                tokens.small = self._run(tokens, range(index, index + 1), tokens.small)
        remove_all([*self._pending])
        self._pending = []
        for projection, refit in changes:
            self._write(projection, refit)

    def _equations(
        self,
        tokens: Calibration,
        index: int,
        step: list[Projection],
        before: list[Tensor],
        goals: list[Tensor],
        *,
        last: bool,
    ) -> list[tuple[Equations, Equations]]:
        """For each projection of a step, the sums over the tokens to fit on, and over those that are held out.

        Args:
            tokens: the smaller model is in front of the layer there.
            index: the layer.
            step: projections that do not depend on each other.
            before: the dense model's stream in front of the layer, for each batch.
            goals: the dense model's stream behind the step, for each batch.
            last: whether the step ends the layer: then that is the stream behind the removed layers too.
        """
        device = self._anatomy.lm.device
        sums: list[tuple[Equations, Equations]] = []
        for number, replay in enumerate(tokens.replays):
            own = [projection for projection in step if not projection.towards_stream]
            of_dense = self._observe(own, replay, index, before[number], whole=False) if own else {}
            start = tokens.small[number].to(device)
            with self._small():
                of_small = self._observe(step, replay, index, start, whole=last)
            counted = tokens.masks[number]
            for place, projection in enumerate(step):
                inputs, given, output = of_small[projection.path]
                if projection.towards_stream:
                    here = output.float() if last else start + self._multiplier * given.float()
                    lacks = self._kept_hidden(goals[number].to(device) - here) / self._multiplier
                else:
                    lacks = of_dense[projection.path][1].float() - given.float()
                regressors = _regressors(projection, inputs, given)
                if counted is not None:
                    regressors, lacks = regressors[counted.bool()], lacks[counted.bool()]
                regressors, lacks = regressors.reshape(-1, regressors.shape[-1]), lacks.reshape(-1, lacks.shape[-1])
                if len(sums) == place:
                    sums.append((_empty(projection, regressors, lacks), _empty(projection, regressors, lacks)))
                sums[place][tokens.is_held_out(number)].add(regressors, lacks)
        for pair in sums:
            for equations in pair:
                for tensor in equations.tensors():
                    tensor.copy_(self._total(tensor))
        return sums

    @property
    def _multiplier(self) -> float:
        """What the outputs of writers are multiplied by where they join the residual stream (Granite)."""
        return float(getattr(self._anatomy.config, "residual_multiplier", None) or 1.0)

    def _kept_hidden(self, lacks: Tensor) -> Tensor:
        if not self._plan.removed("hidden", 0):
            return lacks
        kept = torch.zeros(lacks.shape[-1], device=lacks.device)
        kept[list(self._plan.kept("hidden", 0))] = 1
        return lacks * kept

    # Running layers.

    @contextmanager
    def _small(self) -> Iterator[None]:
        """Inside, the model computes what the smaller one will, with the changes that are not written yet."""
        self._set_masks(0.0)
        for pending in self._pending:
            pending.on = True
        try:
            yield
        finally:
            self._set_masks(1.0)
            for pending in self._pending:
                pending.on = False

    def _set_masks(self, alpha: float) -> None:
        self._masks.alpha.fill_(alpha)
        self._masks.alpha_hidden.fill_(alpha)

    def _cast(self, hidden: Tensor) -> Tensor:
        return hidden.to(self._anatomy.lm.device, self._anatomy.lm.dtype)

    def _stored(self, state: Tensor) -> Tensor:
        """A stream, where those of all batches are kept."""
        return state.float().to(self._store)

    def _run(self, tokens: Calibration, layers: range, states: list[Tensor]) -> list[Tensor]:
        """The streams [B, T, d] behind some layers, from those in front of them."""
        moved = []
        for replay, state in zip(tokens.replays, states, strict=True):
            hidden = self._cast(state)
            for index in layers:
                hidden = replay.run(self._anatomy.layers[index], index, hidden)
            moved.append(self._stored(hidden))
        return moved

    def _run_dense(self, tokens: Calibration, layers: range, watching: Sequence[Projection] = ()) -> list[list[Tensor]]:
        """Move the dense model behind some layers; returns its streams behind writers of the first one on the way."""
        goals: list[list[Tensor]] = [[] for _ in watching]
        before, after = tokens.dense, []
        for replay, state in zip(tokens.replays, before, strict=True):
            with Observed(watching) as seen:
                (moved,) = self._run(Calibration([replay], [None], 0, [], []), layers, [state])
            after.append(moved)
            for goal, projection in zip(goals, watching, strict=True):
                given = seen[projection.path][1] if projection.towards_stream else torch.zeros(())
                goal.append(self._stored(self._cast(state).float() + self._multiplier * given.float()))
        tokens.dense = after
        return goals

    def _observe(
        self, projections: Sequence[Projection], replay: Replay, index: int, state: Tensor, *, whole: bool
    ) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Inputs and outputs of modules of a layer, and the layer's own output, for a stream in front of it.

        Where the `whole` layer is not needed, it runs no further than these modules, and its output is empty.
        """
        output = torch.empty(0)
        with Observed(projections, stop=not whole) as seen, suppress(Enough):
            output = replay.run(self._anatomy.layers[index], index, self._cast(state))
        return {path: (*of_module, output) for path, of_module in seen.items()}

    # Writing.

    def _write(self, projection: Projection, refit: Refit) -> None:
        module, change = projection.module, refit.change
        if not projection.is_linear:
            for name, parameter in module.named_parameters(recurse=False):
                shift = self._anatomy.family.norm_offset if name == "weight" else 0.0
                with self._edited(parameter) as values:
                    values.copy_((values + shift) * (1 + change).to(values.dtype) - shift)
            return
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            with self._edited(bias) as values:
                values += change[-1].to(values.dtype)
            change = change[:-1]
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        with self._edited(weight) as values:
            values += (change if isinstance(module, Conv1D) else change.T).to(values.dtype)


def _regressors(projection: Projection, inputs: Tensor, given: Tensor) -> Tensor:
    """What the errors are regressed on: a projection's inputs, with a 1 for its bias; a norm's outputs."""
    if not projection.is_linear:
        return given.float()
    inputs = inputs.float()
    if getattr(projection.module, "bias", None) is None:
        return inputs
    return torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)


def _empty(projection: Projection, regressors: Tensor, lacks: Tensor) -> Equations:
    if projection.is_linear:
        return NormalEquations.empty(regressors.shape[-1], lacks.shape[-1], regressors.device)
    return ScaleEquations.empty(lacks.shape[-1], regressors.device)


def _store(device: torch.device, batches: Sequence[Mapping[str, Tensor]], hidden: int) -> torch.device:
    """Where the streams of all batches are kept: on a GPU if they take a quarter of its free memory at the most."""
    if device.type != "cuda":
        return torch.device("cpu")
    tokens = sum(next(iter(batch.values())).shape[:2].numel() for batch in batches)
    free, _ = torch.cuda.mem_get_info(device)
    return device if 3 * tokens * hidden * 4 < free / 4 else torch.device("cpu")
