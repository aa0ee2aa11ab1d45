"""`LeastSquaresCompensation`: what stays is refitted in closed form just before the cut."""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from inspect import signature
from itertools import islice
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from tqdm.auto import tqdm

from lightprune.compensation.principal import check_rotation, rotate_to_principal
from lightprune.compensation.refit import Compensation, Refitted
from lightprune.errors import ConfigError, check_choice, check_number
from lightprune.pipeline import PruningCallback, Stage
from lightprune.plan import PruningPlan

Layers = Literal["all", "borders"]

JOINED_TOKENS = 4096
"""How many tokens run through a layer at once, about: small batches would leave a GPU idle."""


class LeastSquaresCompensation(PruningCallback):
    """Refits what stays in closed form just before the cut, so that the cut model computes what the dense one did.

    From the first layer to the last, the projections onto the residual stream (attention's output projection, the MLP's
    down projection) are changed by ridge regression: the regressors are their inputs in the smaller model, as refitted
    so far, and the target is the residual stream of the dense model at the same place, or behind the layers that go.
    The strength of the ridge is chosen for each projection on tokens that are held out, and a projection whose error
    does not fall there is left alone. So no training is needed, and what follows begins from a better start; it then
    needs a lower learning rate. Formulas and sources are in `lightprune.compensation.refit`.

    The tokens are those that training gets next: they are read ahead, and not consumed. Take many, since a refit of too
    few overfits, and trains worse than none. Three residual streams of all of them are held, on the host where the
    device has not plenty of room.

    Args:
        batches: how many batches of the training data to fit on, on each rank.
        layers: "all": every kept layer behind the first loss; or "borders": those that lose units themselves, and those
            in front of removed layers.
        held_out: the share of the batches that chooses the ridges and judges the refits, and is not fitted on.
        rotate: where hidden dimensions go, cut them in the basis of the stream's principal components: the model is
            rotated first (`lightprune.surgery.rotation`), which changes nothing of what it computes, or a little where
            the embeddings are the head. Needs RMS norms in front of attention and MLP. Moments that an optimizer has by
            then are of the old basis.

    Attributes:
        refitted: what was done to each projection.
        seconds: how long it took.
    """

    stage = Stage.COMPENSATE

    def __init__(
        self, batches: int = 128, layers: Layers = "all", held_out: float = 0.0625, rotate: bool = False
    ) -> None:
        self.batches = batches
        self.layers: Layers = layers
        self.held_out = held_out
        self.rotate = rotate
        self.refitted: Sequence[Refitted] = ()
        self.seconds = 0.0

    def check_settings(self) -> None:
        check_number(self, "batches", self.batches, whole=True, least=2)
        check_choice(self, "layers", self.layers, get_args(Layers))
        check_number(self, "held_out", self.held_out, above=0, below=1)

    def check(self) -> None:
        if self.pipeline.cut is None:
            raise ConfigError(
                "LeastSquaresCompensation refits at the cut, and there is none: add a StructuredCut to "
                "trainer.callbacks."
            )
        others = [part for part in self.pipeline.parts if part.folds or (part.alters and part.stage != Stage.SELECT)]
        if others:
            raise ConfigError(
                f"{type(others[0]).__name__} trains the model to do without what goes, so at the cut there is no dense "
                "model to refit towards: leave it or LeastSquaresCompensation out of trainer.callbacks."
            )
        if self.rotate:
            check_rotation(self.pipeline.anatomy)

    def before_cut(self, plan: PruningPlan) -> None:
        """Refit what the plan leaves."""
        start = time.perf_counter()
        adapter, anatomy, trainer = self.pipeline.adapter, self.pipeline.anatomy, self.pipeline.trainer
        names = signature(anatomy.decoder.forward).parameters
        with isolate_rng():
            batches = list(islice(_decoder_inputs(upcoming(trainer), names), self.batches))
        if len(batches) < 2:
            raise ConfigError(
                f"LeastSquaresCompensation needs two batches at least, one to fit on and one held out, and the "
                f"training data has {len(batches)}: give it more, or leave LeastSquaresCompensation out."
            )
        held_out = min(max(round(self.held_out * len(batches)), 1), len(batches) - 1)
        fit, held = joined(batches[:-held_out]), joined(batches[-held_out:])
        with (
            tqdm(total=len(plan.kept_layers), desc="Refitting layers", leave=False, disable=not _shows(trainer)) as bar,
            trainer.precision_plugin.forward_context(),
        ):
            if self.rotate and plan.removed("hidden", 0):
                rotate_to_principal(anatomy, plan, fit, adapter.sum, adapter.edited)
            self.refitted = Compensation(
                anatomy,
                plan,
                [*fit, *held],
                everywhere=self.layers == "all",
                held_out=len(held),
                total=adapter.sum,
                edited=adapter.edited,
                progress=bar.update,
            ).run()
        self.seconds = time.perf_counter() - start
        self._say()

    def _say(self) -> None:
        changed = [one for one in self.refitted if one.strength is not None]
        before, after = sum(one.before for one in changed), sum(one.after for one in changed)
        left = f", {1 - after / before:.0%} less error on held-out tokens" if before else ""
        rank_zero_info(f"Refitted {len(changed)} of {len(self.refitted)} projections in {self.seconds:.1f} s{left}.")
        for one in self.refitted:
            self.pipeline.log({f"compensate/{one.path}/before": one.before, f"compensate/{one.path}/after": one.after})

    def state_dict(self) -> dict[str, Any]:
        return {"refitted": [asdict(one) for one in self.refitted], "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.refitted = [Refitted(**one) for one in state_dict["refitted"]]
        self.seconds = state_dict["seconds"]


def joined(batches: Sequence[Mapping[str, Tensor]], tokens: int = JOINED_TOKENS) -> list[dict[str, Tensor]]:
    """The same sequences in fewer batches: neighbors of one length come together, up to about so many tokens.

    Args:
        batches: tensors [B, T] by name.
        tokens: a batch takes the next one up as long as it has fewer.
    """
    groups: list[list[Mapping[str, Tensor]]] = []
    for batch in batches:
        last = groups[-1] if groups else []
        by_row = len({len(value) for value in batch.values()}) == 1  # positions may be one row for all
        fits = bool(last) and by_row and _lengths(last[0]) == _lengths(batch)
        if fits and sum(next(iter(one.values())).shape[:2].numel() for one in last) < tokens:
            last.append(batch)
        else:
            groups.append([batch])
    return [{name: torch.cat([one[name] for one in group]) for name in group[0]} for group in groups]


def _lengths(batch: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape[1:] for name, value in batch.items()}


def upcoming(trainer: L.Trainer) -> Iterator[object]:
    """Batches of the training data, read without consuming them.

    A `TextDataModule` gives those that come next; a copy of any other loader begins a new iteration.
    """
    loader: Any = trainer.train_dataloader
    ahead = getattr(loader, "upcoming", None)
    yield from ahead() if ahead is not None else copy.copy(loader)


def _decoder_inputs(batches: Iterator[object], names: Mapping[str, object]) -> Iterator[dict[str, Tensor]]:
    """What the decoder takes of each batch.

    Raises:
        ConfigError: a batch is no mapping with `input_ids`.
    """
    for batch in batches:
        if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
            raise ConfigError(
                f"LeastSquaresCompensation reads batches that are mappings with `input_ids`, and the training data "
                f"gives a {type(batch).__name__}: give such batches, or leave LeastSquaresCompensation out."
            )
        yield {name: value for name, value in batch.items() if name in names and isinstance(value, Tensor)}


def _shows(trainer: L.Trainer) -> bool:
    return trainer.progress_bar_callback is not None and trainer.is_global_zero
