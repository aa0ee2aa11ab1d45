"""One run of the resume tests, in a process of its own that may have to kill itself."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import lightprune as lp
from lightprune.callbacks.random_state import RandomState
from lightprune.data import Source, TextDataModule
from lightprune.integrations.lightning import find_causal_lm
from lightprune.module import CausalLM
from tests.families import tiny_lm
from tests.training import Batch, Plain, batches, trainer_for

SELECT, CUT, STEPS = 6, 10, 14


class Shuffled:
    """Batches in a new order each epoch, from where the last run stopped."""

    def __init__(self, count: int) -> None:
        self.batches = batches(count)
        self.consumed = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        epoch, place = divmod(self.consumed, len(self))
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(epoch)).tolist()
        for index in order[place:]:
            self.consumed += 1
            yield self.batches[index]

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self.consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.consumed = state["consumed"]


def text_data(folder: Path) -> TextDataModule:
    """Two domains of the texts in `folder`."""
    return TextDataModule(
        {name: Source(files=str(folder / f"{name}.txt"), separator="|") for name in ("upper", "lower")},
        block_size=8,
        batch_size=2,
        validation=2,
        num_workers=0,
        cache_dir=str(folder / "cache"),
    )


class Kill(Callback):
    """kill -9 as the batch begins that follows so many optimizer steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def callbacks_of(case: dict[str, Any]) -> list[Callback]:
    if case.get("selector") == "influence":
        selector: Callback = lp.BlockInfluenceSelector(drop=2, stop=SELECT)
    elif case.get("selector") == "perplexity":
        selector = lp.GreedyPerplexitySelector(drop=2, stop=SELECT)
    else:
        selector = lp.LayerGateSelector(
            drop=2,
            rounds=case.get("rounds"),
            steps_per_round=case.get("per round", SELECT // 2),
            l1=0.02,
            hold_weights=case.get("hold", True),
            patience=case.get("patience"),
        )
    return [
        lp.StructuredCut(at=CUT),
        lp.GateAnnealing(),
        lp.DifferencePenalty(strength=0.1, ramp="linear"),
        selector,
        lp.Recovery(lr=2e-3, warmup_steps=2, decay="cosine"),
        *([lp.LoRARecovery(r=2, dropout=0.3)] if case.get("lora") else []),
        RandomState(seed=7),
    ]


def checkpoint_of(folder: Path, case: dict[str, Any]) -> ModelCheckpoint:
    if case.get("on validation"):
        return ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=False)
    return ModelCheckpoint(folder, every_n_train_steps=case.get("every", 1), save_last=True, save_top_k=0)


def run(folder: Path, case: dict[str, Any], kill: int | None = None) -> None:
    """Train to the end, from `folder`'s last checkpoint if there is one, and write down how it ended."""
    torch.set_num_threads(1)
    # Deliberately different in every process: nothing may depend on how the generators were left.
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    dropout = {"attention_dropout": 0.3} if case.get("dropout") else {}
    optimizer: Any = lambda p: torch.optim.AdamW(p, lr=2e-3)  # noqa: E731
    scheduler: Any = lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 30)  # noqa: E731
    accumulate = case.get("accumulate", 1)
    module: L.LightningModule
    if "text" in case:
        module = CausalLM(str(case["text"] / "model"), optimizer=optimizer, lr_scheduler=scheduler)
        data: dict[str, Any] = {"datamodule": text_data(case["text"])}
    else:
        module = Plain(tiny_lm("qwen2", **dropout), optimizer=optimizer, scheduler=scheduler)
        data = {"train_dataloaders": Shuffled(8 * accumulate), "val_dataloaders": batches(1)}
    callbacks = [
        *([] if kill is None else [Kill(kill)]),
        *callbacks_of(case),
        checkpoint_of(folder, case),
    ]
    trainer = trainer_for(
        callbacks,
        max_steps=STEPS,
        enable_checkpointing=True,
        accumulate_grad_batches=accumulate,
        val_check_interval=4 * accumulate,
        default_root_dir=folder,
    )
    trainer.fit(module, **data, ckpt_path="last", weights_only=True)
    cut = next(c for c in trainer.callbacks if isinstance(c, lp.StructuredCut))
    selector = next(c for c in trainer.callbacks if hasattr(c, "protect_first"))
    torch.save(
        {
            "weights": module.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "step": trainer.global_step,
            "cut": cut.step,
            "before": cut.metrics["before"],
            "after": cut.metrics["after"],
            "plan": cut.plan.to_dict() if cut.plan else None,
            "selected": selector.plan.to_dict() if selector.plan else None,  # type: ignore[attr-defined]
            "layers": find_causal_lm(module)[1].config.num_hidden_layers,
        },
        folder / "end.pt",
    )
