"""`StrategyAdapter`: what the pipeline needs from a Lightning strategy. One subclass for each supported kind."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lightprune.anatomy import Anatomy
from lightprune.integrations.ranks import sum_over_ranks
from lightprune.plan import PruningPlan
from lightprune.strategies.part_optimizers import all_finite, average_gradients, gradients_of, step_where
from lightprune.surgery import Rows, cut_model, remove_parameters, replace_parameter

Checkpoint = dict[str, Any]
# Gives the model the shape that it had, by the callbacks' states in a checkpoint.
Restructure = Callable[[Mapping[str, object]], None]
# For a new parameter, the one in whose place it is, and the rows that it has of that.
Replaced = dict[nn.Parameter, tuple[nn.Parameter, Rows]]


class StrategyAdapter(ABC):
    """How one kind of Lightning strategy trains, and how it continues when the model changes under it.

    Attributes:
        supports: the Lightning strategies that this one works for.
        trainer: whose strategy it is.
    """

    supports: ClassVar[type[Strategy]]
    # Whether the optimizers that the module made go on after the fit as the ones that trained.
    keeps_optimizers: ClassVar[bool] = True
    # The method of the strategy in which the module is asked for its optimizers.
    makes_optimizers: ClassVar[str] = "setup_optimizers"

    def __init__(self, trainer: L.Trainer) -> None:
        self.trainer = trainer
        self._scale_is_ours = False  # whether parts have stepped under a loss scale that nobody else adjusts

    @property
    def strategy(self) -> Any:
        """Lightning's strategy."""
        return self.trainer.strategy

    @property
    def module(self) -> L.LightningModule:
        """The module, without what the strategy wraps around it."""
        module: L.LightningModule = self.strategy.lightning_module
        return module

    @property
    def optimizers(self) -> list[Optimizer]:
        """The user's own optimizers, without what the strategy wraps around them."""
        return list(self.trainer.optimizers)

    def made(self, returned: object) -> list[Optimizer]:
        """The optimizers that `makes_optimizers` has just made and, perhaps, `returned`."""
        return self.optimizers

    def check_made(self, optimizers: Sequence[Optimizer]) -> None:
        """Refuse optimizers that the strategy cannot train with; called once the module has made them.

        Raises:
            ConfigError: they are such.
        """

    def check(self) -> None:
        """Refuse settings of the strategy under which nothing can be pruned; called before the model is wrapped.

        Raises:
            ConfigError: there are such.
        """

    def check_cut(self) -> None:
        """Refuse settings of the strategy under which a model can be trained and not cut.

        Raises:
            ConfigError: there are such.
        """

    def expect_skips(self, skips: bool) -> None:
        """Say whether steps that move weights may leave whole layers out. Holds from the next wrapping of the model."""

    # Steps.

    @property
    def stepping(self) -> bool:
        """Whether the batch that is running is the last one that its optimizer step accumulates."""
        # Lightning 2.6.6: `_should_accumulate`. Without it parts would step in the middle of accumulation.
        accumulates = self.strategy.handles_gradient_accumulation and self.trainer.fit_loop._should_accumulate()
        return not accumulates

    @property
    def scaler(self) -> GradScaler | None:
        """What scales the loss of a held step, and of others where Lightning does it; None where nothing does."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def held_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The module's training step while its weights stand still: no wrapper waits for their gradients."""
        with self.unwrapped():
            return original(*args, **kwargs)

    def held_backward(self, original: Callable[..., Tensor], loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The backward pass of a held step."""
        with self.unwrapped():
            return original(loss, *args, **kwargs)

    def stepped(self) -> None:
        """Note an optimizer step in which the weights moved."""

    def skip_step(self, optimizer: Optimizer) -> None:
        """Note an optimizer step in which the weights stood still; schedulers warn where no step came before theirs."""
        # torch 2.13: `_opt_called`. Without it schedulers warn in every run that selects before it trains.
        optimizer._opt_called = True  # type: ignore[attr-defined]

    def optimizer_step(self, optimizer: Optimizer, *, held: bool) -> None:
        """Step an optimizer of a part's own, of parameters that the strategy does not know, and clear their gradients.

        They learn from the mean of all ranks' gradients, so every rank must call this. Where no rank has any (every
        batch was skipped), and where these are not finite, nothing moves.

        Args:
            optimizer: of parameters that all ranks hold in the same state.
            held: whether the weights stand still, so that nobody else steps the loss scale.
        """
        present = average_gradients(optimizer, self.mean)
        self._step(optimizer, present, held=held)
        optimizer.zero_grad()

    def _step(self, optimizer: Optimizer, present: Tensor | None, *, held: bool) -> None:
        """Step, if the bool `present` [] holds: whether there are gradients. Waits only where a loss scale does."""
        if self.scaler is None:
            step_where(optimizer, all_finite(gradients_of(optimizer), present))
        elif present is None or present:
            self.scaler.step(optimizer)
            self._scale_is_ours = held

    def adjust_scale(self) -> None:
        """Adjust the loss scale, once all parts have stepped while the weights stand still."""
        if self._scale_is_ours and self.scaler is not None:
            self.scaler.update()
        self._scale_is_ours = False

    @contextmanager
    def unwrapped(self) -> Iterator[None]:
        """The strategy with the module alone, as if nothing had ever been wrapped around it."""
        wrapper = self.strategy.model
        self.strategy.model = self.module
        try:
            yield
        finally:
            self.strategy.model = wrapper

    # The model changes.

    @abstractmethod
    def rewrapped(self) -> AbstractContextManager[Replaced]:
        """Inside, the model and the optimizers' parameters may change. Then the strategy's wrappers are made anew.

        What is entered takes note of every parameter that is replaced.
        """

    def cut(self, anatomy: Anatomy, plan: PruningPlan) -> None:
        """Execute `plan` inside a running fit: model, optimizers, schedulers. `global_step` and the loops go on."""
        with self.rewrapped() as replaced:

            def on_replace(old: nn.Parameter, new: nn.Parameter, rows: Rows) -> None:
                replaced[new] = old, rows
                for optimizer in self.optimizers:
                    replace_parameter(optimizer, old, new, rows)

            removed = [parameter for i in plan.dropped_layers for parameter in anatomy.layers[i].parameters()]
            cut_model(anatomy, plan, on_replace)
            for optimizer in self.optimizers:  # these, and the schedulers, stay the same objects
                remove_parameters(optimizer, schedulers_of(self.trainer, optimizer), removed)

    def load(
        self, original: Callable[..., Checkpoint], restructure: Restructure, path: Any, *args: Any, **kwargs: Any
    ) -> Checkpoint:
        """Load a checkpoint by the strategy's own `load_checkpoint`, into a model that gets its shape first."""
        checkpoint = original(path, *args, **kwargs)
        restructure(checkpoint.get("callbacks", {}))
        return checkpoint

    @property
    def flat(self) -> torch.device | None:
        """The device of the flat tensors that the optimizers step in place of parameters; None where there are none."""
        return None

    @property
    def rates(self) -> dict[nn.Parameter, float]:
        """The learning rate of every parameter that an optimizer trains."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return {parameter: group["lr"] for group in groups for parameter in group["params"]}

    @contextmanager
    def edited(self, parameter: nn.Parameter) -> Iterator[Tensor]:
        """The whole of a parameter at full precision, to be changed in place, by every rank in the same way."""
        yield parameter.detach()

    def whole(self, lm: PreTrainedModel) -> PreTrainedModel | None:
        """A language model that rank 0 can run and write on its own; None on other ranks. Every rank must ask."""
        return lm if self.strategy.is_global_zero else None

    # Ranks.

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all ranks; every rank must ask."""
        return self.sum(tensor) / self.trainer.world_size

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks; every rank must ask."""
        if self.trainer.world_size == 1:
            return tensor.clone()
        return sum_over_ranks(tensor.to(self.strategy.root_device)).to(tensor.device)

    def broadcast(self, value: Any) -> Any:
        """What rank 0 has, on every rank."""
        return self.strategy.broadcast(value)

    def gather(self, value: Any) -> list[Any]:
        """What each rank has, in the order of the ranks, on every rank."""
        if self.trainer.world_size == 1:
            return [value]
        values = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(values, value)
        return values


def schedulers_of(trainer: L.Trainer, optimizer: Optimizer) -> list[object]:
    """The schedulers that drive an optimizer."""
    return [c.scheduler for c in trainer.lr_scheduler_configs if c.scheduler.optimizer is optimizer]
