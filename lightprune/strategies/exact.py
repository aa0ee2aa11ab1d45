"""Lightning's DeepSpeed strategy with the loss divided once, and the same on a CPU.

`deepspeed` comes with an extra, and Lightning imports it where a strategy is made.
"""

import os
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor


class ExactDeepSpeedStrategy(DeepSpeedStrategy):
    """Lightning's `DeepSpeedStrategy`, whose gradients are those of other strategies when they are accumulated.

    Lightning divides the loss by `accumulate_grad_batches`, and the engine divides it again (2.6 with deepspeed
    0.19): gradients, and with them what clipping does and norms that are logged, are too small by that factor. Adam
    hides it, but for its epsilon. Here the engine does not divide.
    """

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Hand the loss to the engine as it is."""
        return super().backward(closure_loss, optimizer, *args, **{"scale_wrt_gas": False, **kwargs})


class CPUDeepSpeedStrategy(ExactDeepSpeedStrategy):
    """Real ZeRO of stages 1, 2 and 3 in several processes on a CPU, over gloo; for tests and for trying out a config.

    It takes what `DeepSpeedStrategy` takes, `stage` first of all, and needs `trainer.accelerator=cpu`. It is slow, and
    saves memory only if its processes run on different machines.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read where deepspeed is imported first
        super().__init__(*args, **kwargs)

    @property
    def root_device(self) -> torch.device:
        """The CPU, with an index, which the engine asks for."""
        return torch.device("cpu", self.local_rank)

    def setup_environment(self) -> None:
        """As on GPUs, without asking for them."""
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """As on GPUs, without comparing their indices."""
        from deepspeed.ops import __compatible_ops__ as compatible

        # Else it is compiled at first use, for a minute, and a process that is killed meanwhile leaves a lock behind
        # that all others wait for. Gloo does as well.
        compatible["deepspeed_shm_comm"] = False
        reset_seed()
        self.set_world_ranks()
        # Lightning 2.6.6: `_init_deepspeed_distributed`. Without it ZeRO would not start without a GPU.
        self._init_deepspeed_distributed()
