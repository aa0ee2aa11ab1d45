"""Where the parts act within a training step: three methods of the strategy, shadowed until the fit is over.

`training_step` and `optimizer_step` are where weights are held still; `backward` is where penalties join the loss:
behind gradient accumulation's division, before any loss scale, and the same for automatic and manual optimization. The
user's own `configure_optimizers`, schedulers and clipping never see a gate: gates have an optimizer of their own.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightprune.errors import ConfigError
from lightprune.integrations.lightning import is_training_pass, shadow_method
from lightprune.pipeline.held_weights import HeldWeights
from lightprune.pipeline.part import Part
from lightprune.strategies import StrategyAdapter


class StepHooks:
    """What a strategy does in a step, with the parts of a pipeline in it.

    Args:
        adapter: of that strategy.
        parts: who adds penalties, learns, and changes weights.
        weights: that may be held still.
    """

    def __init__(self, adapter: StrategyAdapter, parts: Sequence[Part], weights: HeldWeights) -> None:
        self._adapter = adapter
        self._parts = parts
        self._weights = weights
        self._forwarded = False  # whether the LM has run since the last backward: only its losses get a penalty
        self._in_backward = False
        # Who has computed gradients of the LM in this batch: the strategy, or the module past it.
        self._through_strategy = self._past_strategy = False

    def open(self) -> list[Callable[[], None]]:
        """Shadow the strategy's methods; returns the functions that restore them."""
        shadows = {
            "training_step": self._training_step,
            "backward": self._backward,
            "optimizer_step": self._optimizer_step,
        }
        return [shadow_method(self._adapter.strategy, name, shadow) for name, shadow in shadows.items()]

    def watch(self, decoder: nn.Module) -> list[RemovableHandle]:
        """Note the passes of `Anatomy.decoder` that train, and who computes their gradients, until the handles go."""

        def note(module: nn.Module, inputs: tuple[object, ...]) -> None:
            self._forwarded = self._forwarded or is_training_pass(self._adapter.trainer)

        def follow(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not self._manual or not is_training_pass(self._adapter.trainer) or not self._concerned():
                return
            if output[0].requires_grad:
                output[0].register_hook(self._note_gradient)

        return [decoder.register_forward_pre_hook(note), decoder.register_forward_hook(follow)]

    def begin_batch(self) -> None:
        """Forget the batch before: it may have been skipped after its forward pass."""
        self._forwarded = self._through_strategy = self._past_strategy = False

    def end_batch(self) -> None:
        """Refuse a batch whose gradients the parts have not seen, if no optimizer step has led to that already."""
        self._check_backward()

    @property
    def _manual(self) -> bool:
        return not self._adapter.module.automatic_optimization

    def _concerned(self) -> list[str]:
        """The names of the parts that act in backward passes."""
        return list(dict.fromkeys(type(part).__name__ for part in self._parts if part.needs_backward))

    def _note_gradient(self, gradient: Tensor) -> None:
        if self._in_backward:
            self._through_strategy = True
        else:
            self._past_strategy = True

    def _check_backward(self) -> None:
        """Refuse `loss.backward()` in place of `manual_backward`. Other gradients may be computed beside the loss's."""
        if self._past_strategy and not self._through_strategy:
            raise self._refusal()

    def _refusal(self) -> ConfigError:
        return ConfigError(
            f"{type(self._adapter.module).__name__} calls loss.backward(), of which {', '.join(self._concerned())} "
            "would see nothing: call self.manual_backward(loss) in its place."
        )

    def _training_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._weights.held:
            return original(*args, **kwargs)
        try:
            return self._adapter.held_step(original, *args, **kwargs)
        except RuntimeError as error:
            # Of autograd, where `loss.backward()` finds that nothing needs a gradient while the weights stand still.
            if self._manual and not self._in_backward and "does not require grad" in str(error):
                raise self._refusal() from error
            raise

    def _backward(
        self,
        original: Callable[..., Tensor],
        loss: Tensor,
        optimizer: Optimizer | None,
        *args: object,
        **kwargs: Any,
    ) -> Tensor:
        if self._forwarded:
            self._forwarded = False
            penalties = [(part.loss_share, part.penalty()) for part in self._parts]
            for share, _ in penalties:
                loss = loss if share == 1 else share * loss
            for _, penalty in penalties:
                if penalty is not None:
                    loss = loss + penalty.to(loss.device) / self._adapter.trainer.accumulate_grad_batches
        self._in_backward = True
        try:
            if not self._weights.held:
                return original(loss, optimizer, *args, **kwargs)
            if loss.requires_grad:
                return self._adapter.held_backward(original, loss, optimizer, *args, **kwargs)
            return loss
        finally:
            self._in_backward = False

    def _optimizer_step(
        self,
        original: Callable[..., object],
        optimizer: Optimizer,
        closure: Callable[[], object],
        *args: object,
        **kwargs: Any,
    ) -> object:
        def checked() -> object:
            result = closure()
            self._check_backward()  # before any weight moves
            return result

        if not self._weights.held:
            result = original(optimizer, checked if self._manual else closure, *args, **kwargs)
            if self._adapter.stepping:
                self._adapter.stepped()
                for part in self._parts:
                    part.project()
            return result
        result = checked()
        if self._adapter.stepping:
            for part in self._parts:
                part.optimizer_step()
            self._adapter.adjust_scale()
            self._adapter.skip_step(optimizer)
        return result
