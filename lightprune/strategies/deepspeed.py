"""DeepSpeed ZeRO-1, 2 and 3: an engine that owns the weights in full precision, and is built anew when they change."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn
from packaging.specifiers import SpecifierSet
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lightprune.errors import ConfigError
from lightprune.integrations.lightning import shadow_method
from lightprune.integrations.zero_params import gathered, gathered_for_update, is_partitioned, twin, whole_shape
from lightprune.strategies import zero
from lightprune.strategies.base import Checkpoint, Replaced, Restructure, StrategyAdapter, schedulers_of
from lightprune.strategies.exact import ExactDeepSpeedStrategy
from lightprune.strategies.part_optimizers import all_finite, gradients_of, step_where
from lightprune.strategies.zero_checkpoint import is_sharded, model_states, safe_loading
from lightprune.surgery import drop_empty_groups

# Names of deepspeed's that are not public are used, and were checked in these.
VERSIONS = SpecifierSet(">=0.19.8,<0.20")

# Settings of ZeRO under which a rank holds other tensors than those that are carried from engine to engine.
_NOT_CUT = ("zenflow", "zero_hpz_partition_size", "zero_quantized_gradients", "zero_quantized_weights")

# What a ZeRO-3 engine leaves on the modules, and the next one would take for its own: functions of the old engine.
_LEFT_ON_MODULES = ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt")


class DeepSpeed(StrategyAdapter):
    """Lightning's `DeepSpeedStrategy` with ZeRO of stage 1, 2 or 3, and the strategies derived from it."""

    supports = DeepSpeedStrategy
    keeps_optimizers = False
    # Lightning 2.6.6: `_init_optimizers` is where the strategy asks for them. Without it flat ones would be cut in two.
    makes_optimizers = "_init_optimizers"

    def __init__(self, trainer: L.Trainer) -> None:
        super().__init__(trainer)
        self._skips = False
        self._scaler: GradScaler | None = None
        self._places: dict[nn.Parameter, zero.Place] | None = None

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
        for key in _NOT_CUT:
            if settings.get(key) not in (None, False, 1):
                raise ConfigError(
                    f"trainer.strategy.config sets zero_optimization.{key} to {settings[key]!r}, which keeps more of "
                    "the weights than a cut knows of: leave it out."
                )
        if "grad_accum_dtype" in config.get("data_types", {}):
            raise ConfigError(
                "trainer.strategy.config sets data_types.grad_accum_dtype, and the optimizer that deepspeed then takes "
                "cannot be cut: leave it out."
            )
        if self.module is not None and not self.module.automatic_optimization:
            raise ConfigError(
                f"{type(self.module).__name__}.automatic_optimization is False, and under DeepSpeed the engine steps: "
                "set it to True, or use ddp."
            )
        accumulate = self.trainer.accumulate_grad_batches
        if accumulate > 1 and not isinstance(self.strategy, ExactDeepSpeedStrategy):
            rank_zero_warn(
                f"trainer.accumulate_grad_batches is {accumulate}: Lightning divides the loss by it, and deepspeed "
                "again, so that gradients, and what clipping sees, are too small by that factor. "
                "trainer.strategy=lightprune.strategies.ExactDeepSpeedStrategy divides once."
            )

    @property
    def optimizers(self) -> list[Optimizer]:
        return [getattr(optimizer, "optimizer", optimizer) for optimizer in self.trainer.optimizers]

    def made(self, returned: Any) -> list[Optimizer]:
        optimizer, _ = returned
        return [optimizer]

    def check_made(self, optimizers: Sequence[Optimizer]) -> None:
        if not any(group["params"] for optimizer in optimizers for group in optimizer.param_groups):
            raise ConfigError(
                f"{type(self.module).__name__}.configure_optimizers gives nothing to train, and deepspeed needs an "
                "optimizer with parameters: return one, or set trainer.strategy to auto or ddp."
            )

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
        # Lightning 2.6.6: `_forward_redirection`. Without it a held step of ZeRO-3 would find empty parameters.
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

    def expect_skips(self, skips: bool) -> None:
        self._skips = skips

    def stepped(self) -> None:
        if self._skips and zero.is_stage_3(self._zero):
            zero.forget_gradients(self._zero)

    def skip_step(self, optimizer: Optimizer) -> None:
        super().skip_step(self.optimizers[0])

    def _step(self, optimizer: Optimizer, present: Tensor | None, *, held: bool) -> None:
        if held or self.scaler is None:
            super()._step(optimizer, present, held=held)
            return
        gradients = gradients_of(optimizer)
        # torch 2.13: `_foreach_div_`. Without it one division a gradient.
        torch._foreach_div_(gradients, float(self._zero.loss_scale))
        step_where(optimizer, all_finite(gradients, present))

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
        keep = {
            name: getattr(engine, name) for name in ("global_steps", "global_samples", "micro_steps", "skipped_steps")
        }
        scaler = getattr(old, "loss_scaler", None)
        self._dissolve()
        del engine, old
        replaced: Replaced = {}
        yield replaced
        kept = {replaced.get(p, (p, ()))[0] for group in inner.param_groups for p in group["params"]}
        fragments = zero.take(places, inner, kept)
        del places
        drop_empty_groups(inner, schedulers_of(self.trainer, inner))  # deepspeed does, and forgets the schedulers
        self._assemble(inner)
        zero.give(self._zero, fragments, replaced, self.strategy.root_device)
        for name, value in keep.items():
            setattr(self.strategy.model, name, value)
        if scaler is not None:
            self._zero.loss_scaler = scaler

    def _dissolve(self) -> None:
        """Take the engine off the module."""
        engine, self._places = self.strategy.model, None
        self.strategy.model, self.strategy.optimizers = self.module, self.optimizers
        engine.destroy()
        for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):  # these it leaves
            if hook is not None:
                hook.remove()
        if engine.optimizer is not None:  # it is part of cycles, for whose collection its buffers should not wait
            vars(engine.optimizer).clear()
        for module in self.module.modules():
            for name in _LEFT_ON_MODULES:
                vars(module).pop(name, None)
        engine.optimizer = None

    def _assemble(self, optimizer: Optimizer) -> None:
        """Build an engine around the module and an optimizer that there is."""
        schedule = next(iter(self.trainer.lr_scheduler_configs), None)
        restore = shadow_method(self.strategy, self.makes_optimizers, lambda original: (optimizer, schedule))
        try:
            self.strategy.init_deepspeed()
        finally:
            restore()

    def load(
        self,
        original: Callable[..., Checkpoint],
        restructure: Restructure,
        path: Any,
        weights_only: bool | None = None,
    ) -> Checkpoint:
        single_file = not is_sharded(path)
        # The engine is there already: there has to be another one before it loads.
        states = original(path, weights_only) if single_file else model_states(path)
        before = list(self.module.parameters())
        restructure(states.get("callbacks", {}))
        after = list(self.module.parameters())
        if len(before) != len(after) or any(old is not new for old, new in zip(before, after, strict=True)):
            self._dissolve()
            self.strategy.setup_optimizers(self.trainer)
            self.strategy.init_deepspeed()
        if single_file:
            return states
        with safe_loading(self.strategy.model) if weights_only is not False else nullcontext():
            return original(path, weights_only)

    @property
    def flat(self) -> torch.device:
        offloads = "offload_optimizer" in (self.strategy.config or {}).get("zero_optimization", {})
        return torch.device("cpu") if offloads else cast(torch.device, self.strategy.root_device)

    @property
    def rates(self) -> dict[nn.Parameter, float]:
        (optimizer,) = self.optimizers
        groups = zip(zero.groups_of(self._zero), optimizer.param_groups, strict=True)
        return {parameter: group["lr"] for parameters, group in groups for parameter in parameters}

    @contextmanager
    def edited(self, parameter: nn.Parameter) -> Iterator[Tensor]:
        if self._places is None:
            self._places = zero.places_of(self._zero)
        place = self._places.get(parameter)
        if place is None:  # it is frozen: there is nothing but the parameter itself
            with gathered_for_update([parameter]):
                yield parameter.detach()
            return
        part = place.of(place.flat.detach())
        fragments = zero.Fragments(whole_shape(parameter), place.start, {zero.MASTER: part}, {})
        values = fragments.whole(zero.MASTER, self.strategy.root_device)
        yield values
        mine = values.flatten()[place.start : place.start + place.numel]
        part.copy_(mine)
        if is_partitioned(parameter):
            cast(Any, parameter).ds_tensor.detach()[: place.numel].copy_(mine)
        if parameter.shape == values.shape:
            parameter.detach().copy_(values)

    def whole(self, lm: PreTrainedModel) -> PreTrainedModel | None:
        if not any(map(is_partitioned, lm.parameters())):
            return super().whole(lm)
        parameters = {}
        for parameter in lm.parameters():
            values = gathered(parameter)
            if self.strategy.is_global_zero:
                parameters[parameter] = nn.Parameter(values.cpu(), requires_grad=parameter.requires_grad)
        return cast(PreTrainedModel, twin(lm, parameters)) if self.strategy.is_global_zero else None
