"""What is refused, by name, before a process is started or a model wrapped."""

import warnings
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

import lightprune as lp
from lightprune.strategies import adapter_of
from lightprune.strategies import deepspeed as engine_file
from lightprune.strategies.exact import CPUDeepSpeedStrategy
from tests.strategies.runs import small_lm
from tests.training import Plain


def trainer_with(strategy: Strategy | str, **settings: Any) -> L.Trainer:
    return L.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, **settings)


def zero(stage: int = 2, **config: Any) -> CPUDeepSpeedStrategy:
    return CPUDeepSpeedStrategy(config={"zero_optimization": {"stage": stage, **config.pop("settings", {})}, **config})


@pytest.mark.parametrize("strategy", [FSDPStrategy(), ModelParallelStrategy()])
def test_a_strategy_that_is_not_supported(strategy: Strategy) -> None:
    trainer = trainer_with("ddp")
    trainer._accelerator_connector.strategy = strategy  # Lightning itself would refuse them on a CPU
    with pytest.raises(lp.ConfigError, match=f"cannot prune under {type(strategy).__name__}: .*ExactDeepSpeedStrategy"):
        adapter_of(trainer)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (DDPStrategy(static_graph=True), "static_graph is True"),
        (DDPStrategy(model_averaging_period=4), "model_averaging_period is 4"),
        (zero(optimizer={"type": "Adam"}), "has its own 'optimizer'.*`optimizer`"),
        (zero(scheduler={"type": "WarmupLR"}), "has its own 'scheduler'.*`lr_scheduler`"),
        (zero(0), "ZeRO stage 0: set it to 1, 2 or 3"),
        (zero(3, settings={"offload_optimizer": {"device": "nvme"}}), "offloads to nvme"),
        (zero(3, settings={"zero_hpz_partition_size": 2}), "zero_hpz_partition_size to 2"),
        (zero(1, data_types={"grad_accum_dtype": "fp32"}), "data_types.grad_accum_dtype"),
    ],
)
def test_a_setting_that_cannot_work(strategy: Strategy, message: str) -> None:
    with pytest.raises(lp.ConfigError, match=message):
        adapter_of(trainer_with(strategy)).check()


def test_manual_optimization_under_deepspeed() -> None:
    module = Plain(small_lm())
    module.automatic_optimization = False
    trainer = trainer_with(zero())
    trainer.strategy.connect(module)
    with pytest.raises(lp.ConfigError, match=r"Plain\.automatic_optimization is False.*use ddp"):
        adapter_of(trainer).check()


def test_no_optimizer_under_deepspeed() -> None:
    """It is asked for before deepspeed is, which would fail in a way of its own."""

    class Untrained(Plain):
        def configure_optimizers(self) -> None:
            return None

    module, selector = Untrained(small_lm()), lp.RandomSelector(drop=1)
    trainer = trainer_with(zero(), callbacks=[selector, lp.StructuredCut(at=1)], max_steps=2)
    trainer.strategy.connect(module)
    module.trainer = trainer
    selector.setup(trainer, module, "fit")
    with pytest.raises(lp.ConfigError, match=r"Untrained\.configure_optimizers gives nothing to train, and deepspeed"):
        trainer.strategy._init_optimizers()


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn", "ddp_find_unused_parameters_true", *map(zero, (1, 2, 3))])
def test_what_works_is_not_refused(strategy: Strategy | str) -> None:
    trainer = trainer_with(strategy, accumulate_grad_batches=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapter_of(trainer).check()


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_ranks_that_hand_their_weights_to_an_uncut_model(strategy: str) -> None:
    with pytest.raises(lp.ConfigError, match=r"loads what they trained into a model that is not cut.*strategy=ddp"):
        adapter_of(trainer_with(strategy)).check_cut()


@pytest.mark.parametrize("strategy", ["ddp", "auto", zero(2)])
def test_strategies_that_cut(strategy: Strategy | str) -> None:
    adapter_of(trainer_with(strategy)).check_cut()


@pytest.mark.parametrize("installed", ["0.19.7", "0.20.0"])
def test_a_version_of_deepspeed_that_was_not_checked(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_file, "version", lambda name: installed)
    with pytest.raises(lp.ConfigError, match=rf"deepspeed {installed} is installed.*deepspeed>=0\.19\.8,<0\.20"):
        adapter_of(trainer_with(zero())).check()


def test_lightnings_own_strategy_divides_twice_and_says_so() -> None:
    trainer = trainer_with("ddp", accumulate_grad_batches=4)
    trainer._accelerator_connector.strategy = DeepSpeedStrategy(stage=2)  # wants GPUs
    with pytest.warns(UserWarning, match="accumulate_grad_batches is 4.*ExactDeepSpeedStrategy"):
        adapter_of(trainer).check()
