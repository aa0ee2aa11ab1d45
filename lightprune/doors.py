"""The doors into a stranger's training: three methods of its strategy, shadowed on the instance until the fit is over.

`training_step` and `optimizer_step` are where weights are held still; `backward` is where penalties join the loss:
behind gradient accumulation's division, before any loss scale, and the same for automatic and manual optimization. The
user's own `configure_optimizers`, schedulers and clipping never see a gate: gates have an optimizer of their own.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightprune.host import is_training_pass, shadow_method
from lightprune.strategies import Engine

if TYPE_CHECKING:
    from lightprune.pipeline import Part


class HeldWeights:
    """The weights of a module that stand still at present.

    Args:
        module: the user's, with all that it trains.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._held: list[nn.Parameter] = []

    @property
    def held(self) -> bool:
        """Whether any are."""
        return bool(self._held)

    def hold(self) -> None:
        """Let no weight of the module move, or cost a gradient, until `release`."""
        moving = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        self._held += moving  # several parts may hold them
        for parameter in moving:
            parameter.requires_grad_(False)

    def release(self) -> None:
        """Let the weights that `hold` stopped move again."""
        for parameter in self._held:
            parameter.requires_grad_(True)
        self._held = []


class Doors:
    """What a strategy does in a step, with the parts of a pipeline in it.

    Args:
        engine: of that strategy.
        parts: who adds penalties, learns, and changes weights.
        weights: that may be held still.
    """

    def __init__(self, engine: Engine, parts: "Sequence[Part]", weights: HeldWeights) -> None:
        self._engine = engine
        self._parts = parts
        self._weights = weights
        self._forwarded = False  # whether the LM has run since the last backward: only its losses get a penalty

    def open(self) -> list[Callable[[], None]]:
        """Shadow the strategy's methods; returns what uncovers them again."""
        shadows = {
            "training_step": self._training_step,
            "backward": self._backward,
            "optimizer_step": self._optimizer_step,
        }
        return [shadow_method(self._engine.strategy, name, shadow) for name, shadow in shadows.items()]

    def watch(self, decoder: nn.Module) -> RemovableHandle:
        """Note the passes of `Anatomy.decoder` that train, until the handle is removed."""

        def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._forwarded = self._forwarded or is_training_pass(self._engine.trainer)

        return decoder.register_forward_pre_hook(note)

    def _training_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._weights.held:
            return self._engine.held_step(original, *args, **kwargs)
        return original(*args, **kwargs)

    def _backward(
        self,
        original: Callable[..., Tensor],
        loss: Tensor,
        optimizer: Optimizer | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if self._forwarded:
            self._forwarded = False
            for part in self._parts:
                penalty = part.penalty()
                if penalty is not None:
                    loss = loss + penalty.to(loss.device) / self._engine.trainer.accumulate_grad_batches
        if not self._weights.held:
            return original(loss, optimizer, *args, **kwargs)
        if loss.requires_grad:
            return self._engine.held_backward(original, loss, optimizer, *args, **kwargs)
        return loss

    def _optimizer_step(
        self,
        original: Callable[..., Any],
        optimizer: Optimizer,
        closure: Callable[[], Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not self._weights.held:
            result = original(optimizer, closure, *args, **kwargs)
            if self._engine.stepping:
                self._engine.stepped()
                for part in self._parts:
                    part.project()
            return result
        result = closure()
        if self._engine.stepping:
            for part in self._parts:
                part.learn()
            self._engine.adjust_scale()
            self._engine.skip_step(optimizer)
        return result
