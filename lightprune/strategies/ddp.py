"""DDP: whole models on every rank, wrapped into an object that has to be made anew when the parameters change."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
from lightning.pytorch.strategies import DDPStrategy

# Lightning 2.6.6: `_MultiProcessingLauncher` is what `ddp_spawn`, `ddp_fork` and `ddp_notebook` start ranks with.
# Without it a cut would end in weights that fit no model.
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch.nn.parallel import DistributedDataParallel

from lightprune.errors import ConfigError
from lightprune.strategies.base import Replaced, StrategyAdapter


class DDP(StrategyAdapter):
    """Lightning's `DDPStrategy`, however its processes are started."""

    supports = DDPStrategy

    def __init__(self, trainer: L.Trainer) -> None:
        super().__init__(trainer)
        # Lightning 2.6.6: `_ddp_kwargs` is read when the model is wrapped. Without it unused parameters could not be
        # allowed for a while.
        self._options: dict[str, object] = self.strategy._ddp_kwargs

    def check(self) -> None:
        if self._options.get("static_graph"):
            raise ConfigError(
                "DDPStrategy.static_graph is True, and pruning changes the graph while it trains: set "
                "trainer.strategy.init_args.static_graph=false."
            )
        # Lightning 2.6.6: `_model_averaging_period`. Without it ranks could hold different weights at the cut.
        if self.strategy._model_averaging_period is not None:
            raise ConfigError(
                f"DDPStrategy.model_averaging_period is {self.strategy._model_averaging_period}: ranks whose weights "
                "differ cannot be cut as one model; set trainer.strategy.init_args.model_averaging_period=null."
            )

    def check_cut(self) -> None:
        if isinstance(self.strategy.launcher, _MultiProcessingLauncher):
            raise ConfigError(
                "trainer.strategy starts its ranks from one process, which then loads what they trained into a model "
                "that is not cut: set trainer.strategy=ddp, and start the script by itself, by torchrun or by srun."
            )

    @contextmanager
    def rewrapped(self) -> Iterator[Replaced]:
        wrapper = self.strategy.model
        wrapped = isinstance(wrapper, DistributedDataParallel)
        self.strategy.model = self.module
        if wrapped:
            del wrapper.reducer  # with it go the hooks on the parameters, whoever else holds the wrapper
        yield {}
        if wrapped:
            self.strategy.configure_ddp()

    def expect_skips(self, skips: bool) -> None:
        self.strategy._ddp_kwargs = self._options | {"find_unused_parameters": True} if skips else self._options
