"""Runs that one process and two make alike, and what they end with. `python -m tests.strategies.runs` is one of two."""

import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

import lightprune as lp
from tests.families import tiny_lm
from tests.reweighting.runs import text_data, write_texts
from tests.training import Batch, Batches, Plain, batches, trainer_for

SELECT, CUT, STEPS = 4, 7, 10
WORLD = 2
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
OFFLOADED = ("zero2 offload", "zero3 offload")
FINDING = "ddp find unused"
MOMENTS = ("exp_avg", "exp_avg_sq")


def gates(**settings: Any) -> lp.LayerGateSelector:
    return lp.LayerGateSelector(drop=2, steps_per_round=SELECT // 2, l1=0.02, **settings)


def widths() -> lp.ActivationUnitSelector:
    return lp.ActivationUnitSelector(channels=32, kv_groups=1, hidden=24, multiple_of=1, stop=SELECT)


def masks() -> lp.HardConcreteSelector:
    return lp.HardConcreteSelector(stop=SELECT, channels=32, kv_groups=1, hidden=24)


METHODS: dict[str, Callable[[], list[Callback]]] = {
    "masks": lambda: [masks()],
    "drpruning": lambda: [masks(), lp.DomainReweighting(every=2)],
    "trsp": lambda: [gates(), lp.DifferencePenalty(strength=0.1, ramp="linear")],
    "dress": lambda: [widths(), lp.GroupNormPenalty(strength=10.0)],
    "annealed": lambda: [gates(), widths(), lp.GateAnnealing()],
    "gates beside weights": lambda: [gates(hold_weights=False), lp.DifferencePenalty(strength=0.1)],
    "taylor, proximal": lambda: [
        lp.TaylorUnitSelector(channels=32, kv_groups=1, stop=SELECT),
        lp.ProximalGroupLasso(),
    ],
    "influence, magnitude": lambda: [
        lp.BlockInfluenceSelector(drop=2, stop=SELECT),
        lp.MagnitudeUnitSelector(channels=32, start=SELECT),
        lp.Recovery(lr=1e-3, warmup_steps=2),
    ],
    "perplexity": lambda: [lp.GreedyPerplexitySelector(drop=2, stop=SELECT)],
    "lora": lambda: [lp.RandomSelector(drop=2, start=SELECT), lp.LoRARecovery(r=2)],
    "distilled": lambda: [
        lp.RandomSelector(drop=2, start=SELECT),
        lp.ScaleCalibration(stop=CUT - 1),
        lp.Distillation(alpha=0.7, hidden=0.1, snapshot=1),
    ],
    "compensated": lambda: [
        lp.RandomSelector(drop=2, start=SELECT),
        lp.ProjectedGateSelector(channels=32, kv_groups=1, score_steps=SELECT // 2, stop=SELECT),
        lp.LeastSquaresCompensation(batches=3),
    ],
    "rotated": lambda: [widths(), lp.LeastSquaresCompensation(batches=3, rotate=True)],
}


@dataclass
class Case:
    """One run.

    Attributes:
        method: what is pruned, one of `METHODS`.
        accumulate: batches for an optimizer step.
        precision: the trainer's.
        text: train on domains of text, whose weights may follow, and not on random tokens.
        steps: checkpoints to go on from, in new runs; all steps are saved where there are any.
        export: write the model when training ends.
        frozen: let no optimizer train the embeddings.
    """

    method: str
    accumulate: int = 1
    precision: str | None = None
    text: bool = False
    steps: tuple[int, ...] = ()
    export: bool = False
    frozen: bool = False


CASES: dict[str, Case] = {
    f"{method}, accumulating {accumulate}": Case(method, accumulate)
    for method in ("trsp", "dress", "annealed", "masks")
    for accumulate in (1, 2)
}
CASES |= {f"drpruning, accumulating {accumulate}": Case("drpruning", accumulate, text=True) for accumulate in (1, 2)}
CASES |= {method: Case(method) for method in METHODS if f"{method}, accumulating 1" not in CASES}
# In the held window, before, at and after the cut.
CASES["resumed"] = Case("annealed", 2, steps=(2, CUT - 1, CUT, CUT + 1), export=True)
CASES["resumed, frozen"] = Case("masks", steps=(CUT + 1,), frozen=True)
CASES["resumed, lora"] = Case("lora", steps=(CUT + 1,))
CASES["resumed, distilled"] = Case("distilled", steps=(SELECT, CUT + 1), export=True)
HALF = {"bf16": Case("annealed", precision="bf16-mixed"), "fp16": Case("annealed", precision="16-mixed")}
CASES |= HALF


# What is run under what; half precision under DDP has nothing to be compared with, and a CPU no loss scale there.
RUNS = [(s, name) for s in STRATEGIES for name in CASES if s != "ddp" or name not in HALF]
RUNS += [(s, "annealed, accumulating 2") for s in (*OFFLOADED, FINDING)]


class Record(Callback):
    """Keeps losses and learning rates on the way, and what the run ends with."""

    def __init__(self, accumulate: int) -> None:
        self.accumulate = accumulate
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.scales: list[float] = []
        self.after_cut: dict[str, Tensor] = {}
        self.end: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *args: Any) -> None:
        loss = outputs["loss"].detach() * self.accumulate
        self.losses.append(float(trainer.strategy.reduce(loss.clone(), reduce_op="mean")))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.scales.append(float(getattr(trainer.optimizers[0], "loss_scale", 1)))
        if trainer.global_step == CUT + 1 and not self.after_cut:
            self.after_cut = whole_states(trainer)["weights"]

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        cut = next(c for c in trainer.callbacks if isinstance(c, lp.StructuredCut))
        plan = {} if cut.plan is None else cut.plan.to_dict()
        plan.pop("provenance", None)
        self.end = {
            **whole_states(trainer),
            "losses": self.losses,
            "rates": self.rates,
            "scales": self.scales,
            "after cut": self.after_cut,
            "plan": plan,
            "step": trainer.global_step,
            "domains": dict(getattr(trainer.datamodule, "weights", {})),  # type: ignore[attr-defined]
        }


def whole_states(trainer: L.Trainer) -> dict[str, dict[str, Tensor]]:
    """Weights in full precision and moments by name, of all that trains; under ZeRO read by DeepSpeed's own means."""
    module, optimizer = trainer.lightning_module, trainer.optimizers[0]
    states: dict[str, dict[str, Tensor]] = {"weights": {}, **{key: {} for key in MOMENTS}}
    zero = not isinstance(optimizer, torch.optim.Optimizer)
    if zero and hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False  # deepspeed links only the first group
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if zero:
            from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

            states["weights"][name] = safe_get_full_fp32_param(parameter).clone()
            for key in MOMENTS:
                states[key][name] = safe_get_full_optimizer_state(parameter, key).clone()
        else:
            states["weights"][name] = parameter.detach().clone()
            for key in MOMENTS:
                states[key][name] = optimizer.state[parameter][key].clone()
    return states


class OnText(Plain):
    """On batches that say more than the LM takes."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return super().training_step({name: batch[name] for name in ("input_ids", "labels")}, batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        super().validation_step({name: batch[name] for name in ("input_ids", "labels")}, batch_idx)


def small_lm() -> PreTrainedModel:
    """Without biases on keys: their gradient is nothing but rounding, and Adam makes that as large as any other."""
    return tiny_lm("llama_tied", num_layers=5, vocab_size=257, attention_bias=False)


def adamw(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Two groups, as everybody has them: matrices decay, vectors do not. Gradients below epsilon are but rounding."""
    matrices, vectors = [], []
    for parameter in parameters:
        (matrices if len(getattr(parameter, "ds_shape", parameter.shape)) > 1 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0, "lr": 3e-3}]
    return torch.optim.AdamW(groups, lr=2e-3, eps=1e-6)


def cosine(optimizer: Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS)


class Shard:
    """This rank's rows of the same batches that one process takes whole, from where the last run stopped."""

    def __init__(self, accumulate: int, rank: int, world: int) -> None:
        whole = batches(STEPS * accumulate, batch=2 * WORLD)
        self.batches = [{name: value.chunk(world)[rank] for name, value in batch.items()} for batch in whole]
        self.consumed = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches[self.consumed :]:
            self.consumed += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self.consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.consumed = state["consumed"]


def run(
    case: Case,
    strategy: Any,
    folder: Path,
    *,
    rank: int = 0,
    world: int = 1,
    resume: str | None = None,
    more: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Train, from the checkpoint `resume` in `folder`, where what is written goes; return what the run ended with."""
    module = (OnText if case.text else Plain)(small_lm(), optimizer=adamw, scheduler=cosine)
    module.lm.get_input_embeddings().requires_grad_(not case.frozen)
    record = Record(case.accumulate)
    # The record is first: it looks before adapters are merged.
    parts = [record, *METHODS[case.method](), lp.StructuredCut(at=CUT), *more]
    if case.steps:
        name = "{step}" if resume is None else "resumed-{step}"
        parts.append(ModelCheckpoint(folder, filename=name, every_n_train_steps=1, save_top_k=-1))
    if case.export and resume is None:
        parts.append(lp.ExportHF(str(folder / "export")))
    trainer = trainer_for(
        parts,
        STEPS,
        devices=world,
        strategy=strategy,
        accumulate_grad_batches=case.accumulate,
        enable_checkpointing=any(isinstance(part, ModelCheckpoint) for part in parts),
        default_root_dir=folder,
        gradient_clip_val=0.5,
        **({} if case.precision is None else {"precision": case.precision}),
    )
    path = folder / f"{resume}.ckpt" if resume not in (None, "last") else resume
    trainer.fit(module, **data_of(case, folder, rank, world), ckpt_path=path, weights_only=True)
    return record.end


def data_of(case: Case, folder: Path, rank: int, world: int) -> dict[str, Any]:
    """What `fit` takes: this rank's part of batches that are the same, together, for any number of ranks."""
    if case.text:
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            write_texts(folder)
        return {"datamodule": text_data(folder, batch_size=2 * WORLD // world)}
    validation = batches(1, batch=2 * WORLD, seed=999)[0]
    shard = {name: value.chunk(world)[rank] for name, value in validation.items()}
    return {"train_dataloaders": Shard(case.accumulate, rank, world), "val_dataloaders": Batches([shard])}


def strategy_of(name: str, **settings: Any) -> Any:
    """Lightning's strategy of a name among `STRATEGIES` and `OFFLOADED`."""
    if name.startswith("ddp"):
        return DDPStrategy(**({"find_unused_parameters": True} if name == FINDING else {}), **settings)
    from lightprune.strategies.exact import CPUDeepSpeedStrategy

    zero: dict[str, Any] = {
        "stage": int(name[4]),
        "stage3_param_persistence_threshold": 0,  # below it, parameters would stay whole under stage 3
        "memory_efficient_linear": False,  # stage 3 has a projection of its own, which rounds otherwise in bfloat16
    }
    config: dict[str, Any] = {"zero_allow_untested_optimizer": True, "zero_optimization": zero}
    if name.endswith("offload"):
        zero["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False  # torch's optimizer, moved to the CPU
    return CPUDeepSpeedStrategy(config=config, loss_scale_window=2, **settings)


def ends_of(case: Case, strategy: str, rank: int, folder: Path) -> dict[str, Any]:
    """What a case ends with, and each of the runs that go on from one of its checkpoints."""
    undisturbed = run(case, strategy_of(strategy), folder, rank=rank, world=WORLD)
    if not case.steps:
        return undisturbed
    ends = {"undisturbed": undisturbed}
    for step in case.steps:
        resume = f"step={step}"
        ends[resume] = run(case, strategy_of(strategy), folder, rank=rank, world=WORLD, resume=resume)
    return ends


def main(folder: Path, rank: int, strategies: list[str], names: list[str]) -> None:
    """Run every case under every strategy as one of two ranks, and write down each end, or the error."""
    from deepspeed.accelerator import get_accelerator

    torch.set_num_threads(1)
    # DeepSpeed wants a CPU with instructions for float16, and torch does without.
    vars(get_accelerator())["is_fp16_supported"] = lambda: True
    for strategy in strategies:
        for name in names:
            if (strategy, name) not in RUNS:
                continue
            try:
                ends = ends_of(CASES[name], strategy, rank, folder / strategy / name)
            except Exception:
                ends = {"error": traceback.format_exc()}
            path = folder / f"{strategy}, {name}, {rank}.pt"
            torch.save(ends, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["LOCAL_RANK"]), sys.argv[2].split(","), sys.argv[3].split(";"))
