"""DeepSpeed ZeRO-1, 2 and 3: an engine that owns the weights in full precision, and is built anew when they change."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn
from packaging.specifiers import SpecifierSet
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from lightprune.errors import ConfigError
from lightprune.strategies import zero
from lightprune.strategies.base import Checkpoint, Engine, Replaced
from lightprune.strategies.exact import ExactDeepSpeedStrategy

# Names of deepspeed's that are not public are used, and were checked in these.
VERSIONS = SpecifierSet(">=0.19.8,<0.20")


class DeepSpeed(Engine):
    """Lightning's `DeepSpeedStrategy` with ZeRO of stage 1, 2 or 3, and the strategies derived from it."""

    supports = DeepSpeedStrategy

    def __init__(self, trainer: L.Trainer) -> None:
        super().__init__(trainer)
        self._scaler: GradScaler | None = None

    def check(self) -> None:
        installed = version("deepspeed")
        if installed not in VERSIONS:
            raise ConfigError(
                f"deepspeed {installed} is installed, and lightprune cuts under {VERSIONS} only: install "
                "`deepspeed>=0.19.8,<0.20`."
            )
        config = self.strategy.config or {}
        for key in ("optimizer", "scheduler"):
            if key in config:
                raise ConfigError(
                    f"trainer.strategy.config has its own {key!r}, which no cut can carry over: leave it out there, "
                    f"and give the module its `{'lr_scheduler' if key == 'scheduler' else key}`."
                )
        settings = config.get("zero_optimization", {})
        if settings.get("stage") not in (1, 2, 3):
            raise ConfigError(
                f"trainer.strategy has the ZeRO stage {settings.get('stage')}: set it to 1, 2 or 3, or use ddp."
            )
        for key in ("offload_optimizer", "offload_param"):
            device = (settings.get(key) or {}).get("device")
            if device == "nvme":
                raise ConfigError(
                    f"trainer.strategy offloads to nvme ({key}), from where nothing can be cut: offload to cpu."
                )
        if "grad_accum_dtype" in config.get("data_types", {}):
            raise ConfigError(
                "trainer.strategy.config sets data_types.grad_accum_dtype, and the optimizer that deepspeed then takes "
                "cannot be cut: leave it out."
            )
        accumulate = self.trainer.accumulate_grad_batches
        if accumulate > 1 and not isinstance(self.strategy, ExactDeepSpeedStrategy):
            rank_zero_warn(
                f"trainer.accumulate_grad_batches is {accumulate}: Lightning divides the loss by it, and deepspeed "
                "again, so that gradients, and what clipping sees, are too small by that factor. "
                "trainer.strategy=lightprune.strategies.exact.ExactDeepSpeedStrategy divides once."
            )

    @property
    def optimizers(self) -> list[Optimizer]:
        return [getattr(optimizer, "optimizer", optimizer) for optimizer in self.trainer.optimizers]

    # Steps.

    @property
    def scaler(self) -> GradScaler | None:
        if not self.strategy.precision_plugin.precision.startswith("16"):
            return None
        if self._scaler is None:  # of held steps alone: others are the engine's to scale
            self._scaler = GradScaler(self.strategy.root_device.type)
        return self._scaler

    def held_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Through the module's own call, where ZeRO-3 has its hooks; the engine's call would wait for gradients.
        with self.unwrapped(), self.strategy.precision_plugin.train_step_context():
            return self.strategy._forward_redirection(self.module, self.module, "training_step", *args, **kwargs)

    def held_backward(self, original: Callable[..., Tensor], loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("scale_wrt_gas", None)
        with self.unwrapped():
            result = DeepSpeedStrategy.backward(
                self.strategy, loss if self.scaler is None else self.scaler.scale(loss), *args, **kwargs
            )
        if zero.is_stage_3(self._zero):
            self._zero.parameter_offload.release_backward_leftovers()
        return result

    def skip_step(self, optimizer: Optimizer) -> None:
        super().skip_step(self.optimizers[0])

    def _step(self, optimizer: Optimizer, *, held: bool) -> None:
        if held or self.scaler is None:
            super()._step(optimizer, held=held)
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if all(bool(gradient.isfinite().all()) for gradient in gradients):
            torch._foreach_div_(gradients, float(self._zero.loss_scale))
            optimizer.step()

    # The model changes.

    @property
    def _zero(self) -> Any:
        """What deepspeed wraps around the optimizer."""
        return self.strategy.model.optimizer

    @contextmanager
    def rewrapped(self) -> Iterator[Replaced]:
        engine = self.strategy.model
        old, inner = engine.optimizer, engine.optimizer.optimizer
        places = zero.places_of(old)
        for group, parameters in zip(inner.param_groups, zero.groups_of(old), strict=True):
            group["params"] = parameters
        keep = {name: getattr(engine, name) for name in ("global_steps", "global_samples", "micro_steps", "skipped_steps")}
        scaler = getattr(old, "loss_scaler", None)
        self._dissolve()
        del engine, old
        replaced: Replaced = {}
        yield replaced
        kept = {replaced.get(p, (p, ()))[0] for group in inner.param_groups for p in group["params"]}
        fragments = zero.take(places, inner, kept)
        del places
        self._assemble(inner)
        zero.give(self._zero, fragments, replaced, self.strategy.root_device)
        for name, value in keep.items():
            setattr(self.strategy.model, name, value)
        if scaler is not None:
            self._zero.loss_scaler = scaler

    def _dissolve(self) -> None:
        """Take the engine off the module."""
        engine = self.strategy.model
        self.strategy.model, self.strategy.optimizers = self.module, self.optimizers
        engine.destroy()
        # It is part of cycles, and its buffers should not wait for them to be collected.
        vars(engine.optimizer).clear()
        engine.optimizer = None

    def _assemble(self, optimizer: Optimizer) -> None:
        """Build an engine around the module and an optimizer that there is."""
        (schedule,) = self.trainer.lr_scheduler_configs or [None]
        self.strategy._init_optimizers = lambda: (optimizer, schedule)
        try:
            self.strategy.init_deepspeed()
        finally:
            del self.strategy._init_optimizers

    def load(
        self, original: Callable[..., Checkpoint], restructure: Callable[[Mapping[str, Any]], None], *args: Any, **kw: Any
    ) -> Checkpoint:
        return super().load(original, restructure, *args, **kw)
