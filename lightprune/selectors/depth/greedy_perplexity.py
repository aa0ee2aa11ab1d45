"""Greedy perplexity: the search of SLEB (arXiv 2402.09025)."""

import math
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from tqdm import tqdm

from lightprune.errors import ConfigError
from lightprune.integrations.dtypes import in_dtype, main_dtype
from lightprune.masks.forward_passes import call_inputs, evaluating
from lightprune.masks.gates import Bypass, Handle, ReplacedForward, remove_all
from lightprune.metrics import IGNORE_INDEX, token_losses
from lightprune.pipeline import Status
from lightprune.pipeline.steps import Steps
from lightprune.selectors.base import LayerSelector
from lightprune.selectors.target import Target


class GreedyPerplexitySelector(LayerSelector):
    """Drops, one by one, the layer whose absence costs the least perplexity (SLEB, algorithm 1; a baseline here).

    The batches of the window are kept (their token ids) and searched at its end. Where the LM is called without labels,
    or a module calls its decoder for a loss of its own, the loss is that of the next token, padding left out. In a
    round every remaining layer is left out in turn; the hidden states that enter it are cached from one pass over the
    current model, so that a trial runs only the layers behind it: half of the work of running whole passes.

    Args:
        drop: how many layers go; None where `target` says it.
        start: the optimizer step at which the window opens.
        stop: the optimizer step at which it closes and the search runs.
        protect_first: how many of the first layers may not go.
        protect_last: how many of the last layers may not go.
        target: what the model must come out within, see `lightprune.Target`; as few layers go as that needs.
    """

    def __init__(
        self,
        drop: int | None = None,
        start: Steps = 0,
        stop: Steps = 4,
        protect_first: int = 0,
        protect_last: int = 0,
        target: Target | None = None,
    ) -> None:
        super().__init__(drop, start, stop, protect_first, protect_last, hold_weights=True, target=target)
        self._batches: list[dict[str, Tensor]] = []
        self._labels: Tensor | None = None  # of the pass of the LM that has just begun

    def advance(self, step: int) -> None:
        if self.plan is None and not self._handles:  # before the window too: to refuse at once what cannot be searched
            anatomy = self.pipeline.anatomy
            self._handles += [
                anatomy.lm.register_forward_pre_hook(self._note_labels, with_kwargs=True),
                anatomy.decoder.register_forward_pre_hook(self._keep, with_kwargs=True),
            ]
        super().advance(step)

    def _note_labels(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        self._labels = call_inputs(module, args, kwargs).get("labels")

    def _keep(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Keep what the decoder is given, whoever calls it, and the labels, if the LM itself was called with any."""
        labels, self._labels = self._labels, None
        if not self.pipeline.training:
            return
        inputs = call_inputs(module, args, kwargs) | ({} if labels is None else {"labels": labels})
        if not inputs.keys() & {"labels", "input_ids"}:
            raise ConfigError(
                "GreedyPerplexitySelector searches by the loss, and the model is called with `inputs_embeds` and "
                "without `labels`: call the causal LM with `labels`, or use another selector."
            )
        if self.open:
            self._batches.append({name: tensor.clone() for name, tensor in inputs.items()})

    def choose_layers(self) -> tuple[list[int], dict[str, object]]:
        self.detach()
        lm = self.pipeline.lm
        layers = self.pipeline.anatomy.layers
        dropped: list[int] = []
        history = []
        forward_context = self.pipeline.trainer.precision_plugin.forward_context()
        # A module of several dtypes may call decoder and head with a cast between them; the LM itself does not cast.
        with torch.no_grad(), evaluating(lm), in_dtype(lm, main_dtype(lm)), forward_context:
            for number in tqdm(range(self.drop), desc="Searching layers", leave=False):
                losses = self._round(lm, layers, dropped)
                best = min(losses, key=lambda index: (losses[index], index))
                dropped.append(best)
                history.append({"dropped": best, "loss": {str(i): loss for i, loss in losses.items()}})
                self.pipeline.log({f"select/round_{number}/layer_{i:02d}": loss for i, loss in losses.items()})
                rank_zero_info(f"SLEB: layer {best} goes, loss {losses[best]:.3f}")
        self._batches = []
        return dropped, {"rounds": history}

    def _round(self, lm: nn.Module, layers: nn.ModuleList, dropped: list[int]) -> dict[int, float]:
        """Mean loss over the kept batches, in nats a token, with each remaining candidate left out in turn.

        Candidates without which the loss overflows (in float16) are left out: they stay.
        """
        remaining = [index for index in self.candidates if index not in dropped]
        sums = dict.fromkeys(remaining, 0.0)
        tokens: float = 0
        for stored in self._batches:
            inputs = {name: tensor.to(self.pipeline.lm.device) for name, tensor in stored.items()}
            entering = entering_states(lm, layers, inputs, dropped)
            for index in remaining:
                loss, tokens_here = self._loss_without(lm, layers, inputs, index, dropped, entering[index])
                sums[index] += loss
            tokens += tokens_here
        *totals, tokens = self.pipeline.adapter.sum(
            torch.tensor([*sums.values(), tokens], dtype=torch.float64)
        ).tolist()
        finite = {index: total for index, total in zip(sums, totals, strict=True) if math.isfinite(total)}
        if not finite or not tokens:
            raise self.seen_nothing()
        return {index: total / tokens for index, total in finite.items()}

    @staticmethod
    def _loss_without(
        lm: nn.Module,
        layers: nn.ModuleList,
        inputs: dict[str, Tensor],
        index: int,
        dropped: list[int],
        entering: Tensor,
    ) -> tuple[float, int]:
        """The summed loss and the token count with layer `index` left out; layers up to it are not computed."""
        handles: list[Handle] = [Bypass(layers[i], i) for i in {*range(index), *dropped}]
        handles.append(ReplacedForward(layers[index], lambda *args, **kwargs: entering))
        try:
            return summed_loss(lm, inputs)
        finally:
            remove_all(handles)

    def status(self) -> Status:
        return {"kept": len(self._batches)} if self.open else super().status()

    def scores_state(self) -> dict[str, Any]:
        # Each rank's in turn, as they came: each takes back its own. The search sums over all ranks.
        mine = [{name: tensor.cpu() for name, tensor in batch.items()} for batch in self._batches]
        in_turn = zip_longest(*self.pipeline.adapter.gather(mine))  # a rank may have skipped some
        return {"batches": [batch for of_ranks in in_turn for batch in of_ranks if batch is not None]}

    def load_scores_state(self, state: Mapping[str, Any]) -> None:
        trainer = self.pipeline.trainer
        self._batches = state["batches"][trainer.global_rank :: trainer.world_size]


def _call(lm: nn.Module, inputs: dict[str, Tensor]) -> dict[str, object]:
    """The arguments of a pass for the logits alone: a mixture of experts finds no routing where layers are left out."""
    arguments: dict[str, object] = {name: value for name, value in inputs.items() if name != "labels"}
    if hasattr(lm.config, "output_router_logits"):
        arguments["output_router_logits"] = False
    return {**arguments, "use_cache": False, "return_dict": True}


def entering_states(
    lm: nn.Module, layers: nn.ModuleList, inputs: dict[str, Tensor], dropped: list[int]
) -> dict[int, Tensor]:
    """The hidden states [B, T, d] that enter each layer of the model without the `dropped` layers."""
    entering: dict[int, Tensor] = {}

    def remember(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            entering[index] = args[0]

        return hook

    handles: list[Handle] = [layer.register_forward_pre_hook(remember(i)) for i, layer in enumerate(layers)]
    handles += [Bypass(layers[i], i) for i in dropped]
    try:
        lm(**_call(lm, inputs), logits_to_keep=1)
    finally:
        remove_all(handles)
    return entering


def summed_loss(lm: nn.Module, inputs: dict[str, Tensor]) -> tuple[float, int]:
    """The LM's cross entropy over a batch, summed, in nats, and how many tokens it is over."""
    logits = lm(**_call(lm, inputs)).logits
    labels = inputs["labels" if "labels" in inputs else "input_ids"]
    if "labels" not in inputs and "attention_mask" in inputs:
        labels = labels.masked_fill(inputs["attention_mask"] == 0, IGNORE_INDEX)
    loss_sums, token_counts = token_losses(logits, labels)
    return float(loss_sums.sum()), int(token_counts.sum())
