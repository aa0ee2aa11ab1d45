"""Activations: units by what they give on calibration batches (Minitron, FLAP)."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightprune.anatomy import Unit
from lightprune.anatomy.axes import CHANNELS, HEADS, HIDDEN, Axis
from lightprune.anatomy.base import Site
from lightprune.errors import check_choice
from lightprune.importance.groups import of_all_units, unit_ranges
from lightprune.importance.ranking import Metric, activation_scores, add_moments, magnitudes
from lightprune.integrations.zero_params import gathered
from lightprune.selectors.width.calibration import CalibratedUnitSelector, accumulator

Use = Callable[[Tensor], None]
Weighted = bool | Literal["ranges"]

_READ: dict[Unit, Axis] = {"heads": HEADS, "channels": CHANNELS, "hidden": HIDDEN}


class ActivationUnitSelector(CalibratedUnitSelector):
    """Keeps the units with the largest activations; only forward passes are needed, and no loss.

    Activations are an MLP channel's at the input of the down projection, a head's D outputs at the input of the
    attention's output projection, and a hidden dimension's at the output of every norm, where it is scored at each, and
    the mean is taken. The formulas are those of `lightprune.importance.ranking.activation_scores`. Padding tokens
    weigh nothing.

    Args:
        metric: "mean", the mean magnitude over tokens (Minitron, arXiv 2407.14679); "l2", the root of its mean square;
            or "fluctuation", the variance over tokens (FLAP, arXiv 2312.11983): what is constant could be a bias.
        weighted: weigh activations by the weights around them. True: by the norms of the columns that read them, as
            FLAP does: those of the projection that follows, for hidden dimensions those of all that read them.
            "ranges": by how far all the weights reach that go with the unit, see `unit_ranges` in
            `lightprune.importance.groups`.
        settings: those of `UnitSelector`: `heads`, `kv_groups`, `channels`, `hidden`, `multiple_of`, `target`, `start`,
            `stop`.
    """

    def __init__(self, *, metric: Metric = "l2", weighted: Weighted = False, **settings: Any) -> None:
        super().__init__(**settings)
        self.metric: Metric = metric
        self.weighted: Weighted = weighted

    def check_settings(self) -> None:
        super().check_settings()
        check_choice(self, "metric", self.metric, get_args(Metric))
        if not isinstance(self.weighted, bool):
            check_choice(self, "weighted", self.weighted, ("ranges",), ", true or false")

    def attach(self, unit: Unit) -> Tensor:
        shape, sites = self.pipeline.anatomy.shape, self._sites(unit)
        columns = shape.count(unit) * (self._rows(unit) if self.metric == "fluctuation" else 1)
        place: Literal["input", "output"] = "output" if unit == "hidden" else "input"
        self._handles += [
            watch_activation(site.module, place, self._record(unit, index)) for index, site in enumerate(sites)
        ]
        return accumulator(3, len(sites), columns, device=self.pipeline.lm.device)

    def _record(self, unit: Unit, index: int) -> Use:
        rows = self._rows(unit)

        @torch.no_grad()
        def use(activation: Tensor) -> None:
            if not self._scored:
                return
            values = activation.detach().flatten(0, -2).float()
            if self.metric != "fluctuation":
                values = magnitudes(values, rows)
            add_moments(self._sums[unit][:, index], values, self.weights_of_tokens(len(values), values.device))

        return use

    def score(self, unit: Unit, sums: Tensor) -> Tensor:
        norms = self._column_norms(unit) if self.weighted is True else None
        scores = activation_scores(sums, self.metric, self._rows(unit), norms)
        if self.weighted == "ranges":
            scores = scores * of_all_units(self.pipeline.anatomy, unit, unit_ranges).to(scores.device)
        return scores.mean(0) if unit == "hidden" else scores

    @property
    def settings(self) -> dict[str, Any]:
        return {"metric": self.metric, "weighted": self.weighted, "passes": self._passes}

    def _rows(self, unit: Unit) -> int:
        return self.pipeline.anatomy.shape.head_dim if unit == "heads" else 1

    def _sites(self, unit: Unit) -> list[Site]:
        """Where the activations are: of heads and channels one module a layer, of hidden dimensions every norm."""
        if unit == "hidden":
            return [site for site in self.pipeline.anatomy.sites() if site.is_norm and site.axes[0] == HIDDEN]
        return list(self._readers(unit))

    def _readers(self, unit: Unit) -> Iterator[Site]:
        """The projections that read the units."""
        for site in self.pipeline.anatomy.sites():
            if site.reads(_READ[unit]) and not isinstance(site.module, nn.Embedding):
                yield site

    @torch.no_grad()
    def _column_norms(self, unit: Unit) -> Tensor:
        """The l2 norms of the columns that read each of the units' rows: [L, m], for hidden dimensions [d]."""
        norms = torch.stack([column_norms(site, _READ[unit]) for site in self._readers(unit)])
        return cast(Tensor, torch.linalg.vector_norm(norms, dim=0)) if unit == "hidden" else norms


def column_norms(site: Site, axis: Axis) -> Tensor:
    """The l2 norm [m] of each column of a projection's weight: each vector that one of its inputs is multiplied by."""
    (weight,) = [weight for weight in site.weights() if axis in weight.axes and len(weight.axes) > 1]
    dimension = weight.axes.index(axis)
    matrix = gathered(weight.parameter).movedim(dimension, 0)
    return cast(Tensor, torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float32))


def watch_activation(module: nn.Module, place: Literal["input", "output"], use: Use) -> RemovableHandle:
    """Call `use` with a module's first input, or with its output, at each of its forward passes."""
    if place == "input":
        return module.register_forward_pre_hook(lambda module, inputs: use(inputs[0]))
    return module.register_forward_hook(lambda module, inputs, output: use(output))
