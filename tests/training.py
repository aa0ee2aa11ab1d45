"""What the tests train: a plain LightningModule, random batches, and trainers that write nothing."""

import tempfile
from collections import UserList
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.families import tiny_lm, tokens

Batch = dict[str, Tensor]


def sgd(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 256 bytes and an end of text."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


class Plain(L.LightningModule):
    """The module of someone who has never heard of pruning."""

    def __init__(
        self,
        lm: PreTrainedModel | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = sgd,
        scheduler: Callable[[Optimizer], Any] | None = None,
    ) -> None:
        super().__init__()
        self.lm = tiny_lm() if lm is None else lm
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.lm(**batch, use_cache=False).loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", self.lm(**batch, use_cache=False).loss)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "interval": "step"},
        }


class Batches(UserList[Batch]):
    """Batches that Lightning takes for one loader; a plain list would be one loader each."""


def batches(count: int, batch: int = 2, length: int = 10, seed: int = 100) -> Batches:
    """`count` batches of different random tokens, without padding."""
    drawn = [tokens(batch, length, seed + index) for index in range(count)]
    return Batches({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in drawn)


def trainer_for(callbacks: Sequence[Callback], max_steps: int, **kwargs: Any) -> L.Trainer:
    """A trainer on one CPU that logs, saves and prints nothing, and writes nothing where the tests run."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": tempfile.gettempdir(),
    }
    return L.Trainer(callbacks=list(callbacks), max_steps=max_steps, **(defaults | kwargs))


def fit(
    module: L.LightningModule, callbacks: Sequence[Callback], data: Sequence[Batch], max_steps: int, **kwargs: Any
) -> L.Trainer:
    """Fit on `data`, validate on its first batch, and hand the trainer back."""
    trainer = trainer_for(callbacks, max_steps, **kwargs)
    trainer.fit(module, Batches(data), Batches(data[:1]))
    return trainer


class Spy(Callback):
    """Calls `look(trainer, module)` at one hook and keeps what it returns.

    It sees a step before the parts move on.
    """

    def __init__(self, look: Callable[[L.Trainer, L.LightningModule], Any], hook: str = "on_train_batch_end") -> None:
        self.seen: list[Any] = []

        def remember(trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
            self.seen.append(look(trainer, module))

        setattr(self, hook, remember)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], rtol: float = 1e-4, atol: float = 1e-6) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(
            left[name], right[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )
