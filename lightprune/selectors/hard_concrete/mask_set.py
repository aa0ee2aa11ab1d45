"""Hard-concrete masks over the units of a model, their multipliers, and what both amount to. Knows no trainer.

Shapes: L layers, G key-value groups, P query heads in each, H = G P heads, I channels, d hidden dimensions.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightprune.anatomy import Anatomy, Shape, Structure
from lightprune.importance.ranking import highest, highest_heads
from lightprune.masks.hard_concrete import INITIAL, LIMIT, deterministic, lagrangian, probability_open, sample
from lightprune.masks.soft_masks import Values
from lightprune.plan import PruningPlan


class MaskSet:
    """A mask for every unit of the structures in which `target` has less than `source`.

    All rows of a structure's masks (one a layer; one a key-value group for the heads inside groups) have the same
    target: as many stay in each. Where every query head has a key-value head of its own, there is one mask for both.

    Args:
        source: the counts of the uncut model.
        target: the counts to arrive at.
        device: where the masks live.

    Attributes:
        logits: for each structure float32 "layers" [L], "kv_groups" [L, G], "heads" [L, G, P] ([L, H] without groups),
            "channels" [L, I], "hidden" [d].
        keep: how many stay along the last dimension of each.
        multipliers: lambda_1 and lambda_2 of each structure, float32 [S, 2].
    """

    def __init__(self, source: Shape, target: Shape, device: torch.device) -> None:
        self.source, self.target = source, target
        layers, groups, per_group = source.layers, source.kv_groups, source.heads_per_group
        sizes: dict[Structure, tuple[tuple[int, ...], int]] = {
            "layers": ((layers,), target.layers),
            "kv_groups": ((layers, groups), target.kv_groups),
            "heads": ((layers, groups, per_group), target.heads_per_group),
            "channels": ((layers, source.channels), target.channels),
            "hidden": ((source.hidden,), target.hidden),
        }
        if per_group == 1:
            sizes["heads"] = sizes.pop("kv_groups")
        masked = {structure: entry for structure, entry in sizes.items() if entry[1] < entry[0][-1]}
        self.keep = {structure: keep for structure, (_, keep) in masked.items()}
        self.logits = {
            structure: torch.full(size, INITIAL, dtype=torch.float32, device=device, requires_grad=True)
            for structure, (size, _) in masked.items()
        }
        self.multipliers = torch.zeros(len(masked), 2, dtype=torch.float32, device=device, requires_grad=True)

    def sampled(self, seed: int, number: int) -> Values:
        """The values of one draw, the same for the same seed and number, on every device and rank."""
        state = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state))
        drawn: dict[Structure, Tensor] = {}
        for structure, logits in self.logits.items():
            noise = torch.rand(logits.shape, generator=generator, dtype=torch.float32)
            drawn[structure] = sample(logits, noise.clamp(1e-6, 1 - 1e-6).to(logits.device))
        return self._values(drawn)

    @torch.no_grad()
    def deterministic(self, progress: float) -> Values:
        """The values for evaluation, with as many units open as the current target says."""
        counts = {structure: self._count(structure, progress) for structure in self.logits}
        return self._values({s: deterministic(logits, counts[s]) for s, logits in self.logits.items()})

    def penalty(self, progress: float) -> Tensor:
        """The sum of all structures' Lagrangians."""
        targets = self.targets(progress)
        terms = [
            lagrangian(_sparsity(logits), targets[structure], *multipliers)
            for (structure, logits), multipliers in zip(self.logits.items(), self.multipliers, strict=True)
        ]
        return torch.stack(terms).sum()

    def targets(self, progress: float) -> dict[Structure, float]:
        """The share of each structure's masks that should be closed at `progress` in [0, 1]."""
        return {s: progress * (1 - self.keep[s] / logits.shape[-1]) for s, logits in self.logits.items()}

    @torch.no_grad()
    def sparsities(self) -> Tensor:
        """The share of each structure's masks that is expected to be closed, [S], in the order of `logits`."""
        return torch.stack([_sparsity(logits).mean() for logits in self.logits.values()])

    @torch.no_grad()
    def probabilities(self) -> dict[Structure, Tensor]:
        """The probability that a unit stays, as `surgery.expected_parameters` takes it."""
        found = {structure: probability_open(logits) for structure, logits in self.logits.items()}
        if self.source.heads_per_group == 1:
            return found | ({"kv_groups": found["heads"]} if "heads" in found else {})
        heads = self._heads(found)
        return found if heads is None else found | {"heads": heads}

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the logits where they have a gradient."""
        for logits in self.logits.values():
            logits.clamp_(-LIMIT, LIMIT)

    @torch.no_grad()
    def plan(self, anatomy: Anatomy, **provenance: Any) -> PruningPlan:
        """The plan that keeps the units with the highest logits, as many as the target says in every layer."""
        logits = {structure: values.detach().cpu() for structure, values in self.logits.items()}
        source, target = self.source, self.target
        heads = None
        if "heads" in logits or "kv_groups" in logits:
            of_heads = logits.get("heads", torch.zeros(source.layers, source.heads)).flatten(1)
            alone = of_heads if source.heads_per_group == 1 else torch.zeros(source.layers, source.kv_groups)
            of_groups = logits.get("kv_groups", alone)
            heads = [highest_heads(*of_layer, target) for of_layer in zip(of_heads, of_groups, strict=True)]
        channels = [highest(of_layer, target.channels) for of_layer in logits.get("channels", ())] or None
        return PruningPlan.of(
            anatomy,
            layers=highest(logits["layers"], target.layers) if "layers" in logits else None,
            heads=heads,
            channels=channels,
            hidden=highest(logits["hidden"], target.hidden) if "hidden" in logits else None,
            **provenance,
        )

    def state_dict(self) -> dict[str, Any]:
        """Copies of the tensors."""
        return {
            "logits": {structure: values.detach().clone() for structure, values in self.logits.items()},
            "multipliers": self.multipliers.detach().clone(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for structure, values in self.logits.items():
            values.copy_(state["logits"][structure])
        self.multipliers.copy_(state["multipliers"])

    def _count(self, structure: Structure, progress: float) -> int:
        there = self.logits[structure].shape[-1]
        return there - int(progress * (there - self.keep[structure]) + 0.5)

    def _values(self, masks: Mapping[Structure, Tensor]) -> Values:
        return Values(
            layers=masks.get("layers"),
            heads=self._heads(masks),
            channels=masks.get("channels"),
            hidden=masks.get("hidden"),
        )

    def _heads(self, of: Mapping[Structure, Tensor]) -> Tensor | None:
        """Of every query head [L, H]: what its own mask says times what its group's does."""
        heads, groups = of.get("heads"), of.get("kv_groups")
        if groups is None:
            return None if heads is None else heads.flatten(1)
        of_groups = groups.repeat_interleave(self.source.heads_per_group, dim=-1)
        return of_groups if heads is None else of_groups * heads.flatten(1)


def _sparsity(logits: Tensor) -> Tensor:
    """The expected share of closed masks in each row."""
    return 1 - probability_open(logits.reshape(-1, logits.shape[-1])).mean(-1)
