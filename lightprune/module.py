"""`CausalLM`: a LightningModule around any Hugging Face causal LM. It knows nothing of pruning."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightprune.data import TextDataModule
from lightprune.errors import ConfigError
from lightprune.hub import Dtype, load_causal_lm, load_tokenizer
from lightprune.integrations.lightning import data_of
from lightprune.integrations.zero_params import whole_construction
from lightprune.metrics import DomainLoss, token_losses


class CausalLM(LightningModule):
    """Trains and validates a causal LM on batches of `input_ids`, `attention_mask`, `labels` and `domain`.

    `input_ids`, `attention_mask` and `labels` are [B, T] int64 (labels are not shifted; -100 is ignored),
    `domain` is [B] int64, an index into the data module's `domain_names`. Mask and domain may be absent.

    Logs `train/loss` every step and, at the end of an evaluation, `val/loss` and `val/ppl`; where the data
    module names domains, also `val/loss/<domain>` and `val/ppl/<domain>`. Likewise `test/...`. Losses are in
    nats per token.

    The weights are loaded in `configure_model`, after all callbacks have checked their settings.

    Args:
        model: Hub id, local directory, .gguf file, or `pkg://<package>/<file>`.
        dtype: dtype of the weights; the precision of the computation is the trainer's `precision`.
        attn_implementation: "eager", "sdpa", "flash_attention_2", ...; None lets transformers choose.
        gradient_checkpointing: recompute activations in the backward pass: less memory, a third more time.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run model code from the Hub repository.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the scheduler from the optimizer; stepped after every optimizer step.

    Attributes:
        lm: the Hugging Face model, from `configure_model` on.
    """

    lm: PreTrainedModel

    def __init__(
        self,
        model: str,
        dtype: Dtype = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.lm_dtype = dtype
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that lies with the model, loaded on first use."""
        return load_tokenizer(self.model, revision=self.revision, trust_remote_code=self.trust_remote_code)

    def setup(self, stage: str) -> None:
        names: Sequence[str] = getattr(data_of(self.trainer), "domain_names", ())
        self.val_metric = DomainLoss(names)
        self.test_metric = DomainLoss(names)

    def configure_model(self) -> None:
        if hasattr(self, "lm"):  # Lightning calls this once per fit, validate and test
            return
        with whole_construction():  # weights are loaded into whole parameters; ZeRO-3 partitions them afterwards
            self.lm = load_causal_lm(
                self.model,
                dtype=self.lm_dtype,
                attn_implementation=self.attn_implementation,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
            ).train()
        if self.gradient_checkpointing:
            # 5.23 calls it activation_checkpointing_enable; only this name is in every 5.x.
            self.lm.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]

    def on_fit_start(self) -> None:
        data = data_of(self.trainer)
        if isinstance(data, TextDataModule):
            check_fits(self.lm, data)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """The mean loss per token to train on; for callbacks, each sample's summed token losses and token count [B]."""
        loss_sums, token_counts = self._token_losses(batch)
        loss = loss_sums.sum() / token_counts.sum().clamp(min=1)
        self.log("train/loss", loss, prog_bar=True)
        return {"loss": loss, "loss_sums": loss_sums.detach(), "token_counts": token_counts}

    def validation_step(
        self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """For callbacks, each sample's summed token losses and token count [B]."""
        loss_sums, token_counts = self._token_losses(batch)
        self.val_metric.update(loss_sums, token_counts, batch.get("domain"))
        return {"loss_sums": loss_sums, "token_counts": token_counts}

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.test_metric.update(*self._token_losses(batch), batch.get("domain"))

    def on_validation_epoch_end(self) -> None:
        self._log_metric("val", self.val_metric)

    def on_test_epoch_end(self) -> None:
        self._log_metric("test", self.test_metric)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"},
        }

    def _token_losses(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        output: Any = self.lm(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False)
        return token_losses(output.logits, batch["labels"])

    def _log_metric(self, stage: str, metric: DomainLoss) -> None:
        # `compute` is already the same on every rank; `sync_dist` only tells Lightning so.
        self.log_dict({f"{stage}/{name}": value for name, value in metric.compute().items()}, sync_dist=True)
        metric.reset()


def check_fits(lm: PreTrainedModel, data: TextDataModule) -> None:
    """Refuse tokens and positions for which a model has no embeddings.

    Blocks beyond the context of a model whose positions need none are worth a warning.

    Raises:
        ConfigError: the tokenizer is another model's, or the blocks are too long.
    """
    tokens = cast(nn.Embedding, lm.get_input_embeddings())
    # Some tokenizers have one or two added tokens more, which no text has.
    if data.tokenizer.vocab_size > tokens.num_embeddings:
        raise ConfigError(
            f"The tokenizer has {data.tokenizer.vocab_size} tokens, and the model embeds {tokens.num_embeddings}: set "
            "data.tokenizer to the model's own, or to null if that lies with the model."
        )
    context = getattr(lm.config, "max_position_embeddings", None)
    if context is None or data.block_size <= context:
        return
    sentence = f"data.block_size is {data.block_size}, and the model's context has {context} positions"
    if any(isinstance(module, nn.Embedding) and module is not tokens for module in lm.modules()):
        raise ConfigError(f"{sentence}: set it to at most that.")
    rank_zero_warn(f"{sentence}: what lies beyond, it has never seen.")
