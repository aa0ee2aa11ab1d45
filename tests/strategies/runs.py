"""Runs that one process and two make alike, and what they end with. `python -m tests.strategies.runs` is one of two."""

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

import lightprune as lp
from tests.families import tiny_lm
from tests.training import Batch, Batches, Plain, batches, trainer_for

SELECT, CUT, STEPS = 4, 7, 10
WORLD = 2


def gates(**settings: Any) -> lp.LayerGateSelector:
    return lp.LayerGateSelector(drop=2, steps_per_round=SELECT // 2, l1=0.02, **settings)


def widths() -> lp.ActivationUnitSelector:
    return lp.ActivationUnitSelector(channels=32, kv_groups=1, hidden=24, multiple_of=1, stop=SELECT)


METHODS: dict[str, Callable[[], list[Callback]]] = {
    "trsp": lambda: [gates(), lp.DifferencePenalty(strength=0.1, ramp="linear")],
    "dress": lambda: [widths(), lp.GroupNormPenalty(strength=10.0)],
    "annealed": lambda: [gates(), widths(), lp.GateAnnealing()],
}


@dataclass
class Case:
    """One run.

    Attributes:
        method: what is pruned, one of `METHODS`.
        accumulate: batches for an optimizer step.
        settings: more arguments of the trainer.
    """

    method: str
    accumulate: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    model: str = "llama_tied"
    validate: bool = True


class Record(Callback):
    """Keeps losses, learning rates and weights on the way, and what the run ends with."""

    def __init__(self, accumulate: int) -> None:
        self.accumulate = accumulate
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.after_cut: dict[str, Tensor] = {}
        self.end: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *args: Any) -> None:
        loss = outputs["loss"].detach() * self.accumulate
        self.losses.append(float(trainer.strategy.reduce(loss.clone(), reduce_op="mean")))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        if trainer.global_step == CUT + 1 and not self.after_cut:
            self.after_cut = whole_states(trainer)["weights"]

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        cut = next(c for c in trainer.callbacks if isinstance(c, lp.StructuredCut))
        self.end = {
            **whole_states(trainer),
            "losses": self.losses,
            "rates": self.rates,
            "after cut": self.after_cut,
            "plan": cut.plan.to_dict() if cut.plan else None,
            "before": cut.metrics.get("before"),
            "after": cut.metrics.get("after"),
            "step": trainer.global_step,
        }


def whole_states(trainer: L.Trainer) -> dict[str, dict[str, Tensor]]:
    """Weights in full precision and moments by name; under ZeRO read by DeepSpeed's own means."""
    module, optimizer = trainer.lightning_module, trainer.optimizers[0]
    states: dict[str, dict[str, Tensor]] = {"weights": {}, "exp_avg": {}, "exp_avg_sq": {}}
    zero = not isinstance(optimizer, torch.optim.Optimizer)
    if zero and hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False  # deepspeed links only the first group
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in module.named_parameters():
        if zero:
            from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

            states["weights"][name] = safe_get_full_fp32_param(parameter).clone()
            for key in ("exp_avg", "exp_avg_sq"):
                states[key][name] = safe_get_full_optimizer_state(parameter, key).clone()
        else:
            states["weights"][name] = parameter.detach().clone()
            for key in ("exp_avg", "exp_avg_sq"):
                states[key][name] = optimizer.state[parameter][key].clone()
    return states


def adamw(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Two groups, as everybody has them: matrices decay, vectors do not."""
    matrices, vectors = [], []
    for parameter in parameters:
        (matrices if len(getattr(parameter, "ds_shape", parameter.shape)) > 1 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0, "lr": 3e-3}]
    return torch.optim.AdamW(groups, lr=2e-3)


def cosine(optimizer: Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS)


def data_of(accumulate: int, rank: int, world: int) -> Batches:
    """This rank's rows of the same batches that one process takes whole."""
    whole = batches(STEPS * accumulate, batch=2 * WORLD)
    return Batches({name: value.chunk(world)[rank] for name, value in batch.items()} for batch in whole)


def run(case: Case, strategy: Any, *, rank: int = 0, world: int = 1, callbacks: tuple[Callback, ...] = ()) -> Any:
    """Train, and return what the run ended with."""
    module = Plain(tiny_lm(case.model, num_layers=5), optimizer=adamw, scheduler=cosine)
    record = Record(case.accumulate)
    parts = [*METHODS[case.method](), lp.StructuredCut(at=CUT, validate=case.validate), record, *callbacks]
    settings: dict[str, Any] = {"gradient_clip_val": 0.5, **case.settings}
    trainer = trainer_for(
        parts,
        STEPS,
        devices=world,
        strategy=strategy,
        accumulate_grad_batches=case.accumulate,
        use_distributed_sampler=False,
        **settings,
    )
    validation = Batches([{k: v.chunk(world)[rank] for k, v in batches(1, batch=2 * WORLD, seed=999)[0].items()}])
    trainer.fit(module, data_of(case.accumulate, rank, world), validation)
    return record.end


def strategy_of(name: str) -> Any:
    if name == "ddp":
        return "ddp"
    from lightprune.strategies.exact import CPUDeepSpeedStrategy

    # Below the threshold, parameters would stay whole under stage 3.
    settings = {"stage": int(name[-1]), "stage3_param_persistence_threshold": 0}
    return CPUDeepSpeedStrategy(config={"zero_allow_untested_optimizer": True, "zero_optimization": settings})


CASES: dict[str, Case] = {
    f"{method}, accumulating {accumulate}": Case(method, accumulate) for method in METHODS for accumulate in (1, 2)
}


CASES["debug1"] = Case("dress", model="llama")
CASES["debug2"] = Case("dress", validate=False)


def main(folder: Path, rank: int, strategies: list[str], names: list[str]) -> None:
    """Run every case under every strategy as one of two ranks, and write down each end, or the error."""
    torch.set_num_threads(1)
    for strategy in strategies:
        for name in names:
            path = folder / f"{strategy}, {name}, {rank}.pt"
            try:
                end = run(CASES[name], strategy_of(strategy), rank=rank, world=WORLD)
            except Exception as error:
                import traceback

                traceback.print_exc()
                end = {"error": f"{type(error).__name__}: {error}"}
                torch.save(end, path)
            torch.save(end, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["LOCAL_RANK"]), sys.argv[2].split(","), sys.argv[3].split(";"))
