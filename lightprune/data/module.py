"""`TextDataModule`: named domains of text, packed into blocks and mixed by weight."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lightprune.data.blocks import BlockDataset, OrderedSampler, Split, split_blocks
from lightprune.data.mixture import MixtureLoader, MixtureSampler, check_weights
from lightprune.data.sources import Source
from lightprune.data.tokens import TokenCache, cache_entry, cache_root, tokenize_once, tokenizer_identity
from lightprune.errors import ConfigError
from lightprune.hub import load_tokenizer
from lightprune.preemption import outlive_preemption

_PREFETCH = 2  # batches a worker, torch's own default: the sampler has to know it


class TextDataModule(LightningDataModule):
    """Language-model batches from a weighted mixture of text domains.

    Each domain is tokenized once, into a cache on disk; EOS closes every document; the tokens are packed into blocks
    of `block_size`. The only tokens left out are the tails that do not fill a block (a log line says how many).

    A batch holds `input_ids`, `attention_mask` and `labels`, [B, T] int64, and `domain`, [B] int64, an index into
    `domain_names`. Labels are the tokens themselves, not shifted; -100 is ignored, and occurs only where an
    evaluation on several ranks needs a sample to fill up with.

    Training draws domains by weight, without an end; an epoch is as many batches as the training blocks fill. What has
    been consumed is part of the checkpoint, and a resumed run goes on with exactly the next batch. Validation (and
    test, which is the same) shows every held-out block once, all domains in one loader.

    Works the same with and without the Trainer's `use_distributed_sampler`.

    Args:
        domains: The source of each domain, by name.
        tokenizer: Hub id, directory, GGUF file or `pkg://` URI, or a tokenizer; None takes the `tokenizer` of the
            LightningModule.
        block_size: Tokens in a block, T.
        batch_size: Blocks in a batch of one rank, B.
        weights: How often each domain is drawn, in any unit, 0 for never. None draws every block equally often, so
            that a domain weighs as much as it has blocks. A resumed run keeps the weights of its checkpoint.
        validation: What is held out of each domain, at least: a share of its blocks, or a number of blocks. Whole
            documents are held out where that comes to at most twice as much, and else the end of the text, which may
            cut one document in two. The same blocks for every `seed`.
        num_workers: Worker processes for each loader.
        seed: Of the order in which blocks are drawn.
        cache_dir: None is the environment's `LIGHTPRUNE_CACHE`, or else `~/.cache/lightprune`. Nodes of one run should
            share it: rank 0 fills it, and a rank that finds nothing there tokenizes the text for itself.

    Attributes:
        domain_names: The domains, in the order of their indices.

    Raises:
        ConfigError: A setting that cannot work; at construction, where it takes no look at the text.
    """

    def __init__(
        self,
        domains: dict[str, Source],
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        block_size: int = 512,
        batch_size: int = 8,
        weights: dict[str, float] | None = None,
        validation: int | float = 0.05,
        num_workers: int = 2,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.prepare_data_per_node = (
            False  # nodes share the cache, and Lightning's default has all of them make it at once
        )
        if not domains:
            raise ConfigError("data.domains is empty, but must name at least one domain.")
        for name, source in domains.items():
            source.check(name)
        for key, value, least in (
            ("block_size", block_size, 2),  # one token predicts the next
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ConfigError(f"data.{key} is {value}, but must be at least {least}.")
        if not (validation >= 1 if isinstance(validation, int) else 0 < validation < 1):
            raise ConfigError(
                f"data.validation is {validation}, but must be a share between 0 and 1, or a number of blocks from 1."
            )
        if weights is not None:
            check_weights(weights, list(domains))
        self.domains = domains
        self.domain_names = list(domains)
        self.block_size = block_size
        self.batch_size = batch_size
        self.initial_weights = weights
        self.validation = validation
        self.num_workers = num_workers
        self.seed = seed
        self.cache_dir = cache_dir
        self._tokenizer = tokenizer
        self._splits: dict[str, Split] = {}
        self._sampler: MixtureSampler | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded at first use.

        Raises:
            ConfigError: There is none, or it has no EOS token to close documents with.
        """
        if self._tokenizer is None:
            self._tokenizer = getattr(self.trainer and self.trainer.lightning_module, "tokenizer", None)
        if self._tokenizer is None:
            raise ConfigError("data.tokenizer is null, and the model brings none: name a tokenizer in data.tokenizer.")
        if isinstance(self._tokenizer, str):
            self._tokenizer = load_tokenizer(self._tokenizer)
        if self._tokenizer.eos_token_id is None:
            raise ConfigError(
                "The tokenizer has no EOS token to close documents with: choose another one in data.tokenizer."
            )
        return self._tokenizer

    @property
    def weights(self) -> dict[str, float]:
        """The mixture weights that were set last. Available once the training data is set up."""
        return self._mixture.weights

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Changes the mixture while training runs: see `MixtureSampler.set_weights`.

        Raises:
            ConfigError: The weights do not fit the domains.
        """
        self._mixture.set_weights(weights)

    def prepare_data(self) -> None:
        """Tokenizes what is not in the cache yet, on rank 0 alone."""
        self._open_caches()

    def setup(self, stage: str) -> None:
        """Opens the cache, and starts the training mixture from its beginning if `stage` is "fit"."""
        if not self._splits:
            for name, cache in self._open_caches().items():
                self._splits[name] = self._split(name, cache)
        if stage == "fit":
            self._sampler = self._new_sampler()

    def train_dataloader(self) -> MixtureLoader:
        """The mixture. It has a length, but its iteration does not end by itself."""
        dataset = BlockDataset([split.train for split in self._splits.values()])
        return MixtureLoader(dataset, self._mixture, **self._loader_options())

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """All held-out blocks, one domain after another; a batch may hold two domains."""
        dataset = BlockDataset([split.validation for split in self._splits.values()])
        num_replicas, rank = self._replicas()
        sampler = OrderedSampler(dataset, num_replicas=num_replicas, rank=rank)
        return DataLoader(dataset, sampler=sampler, batch_size=self.batch_size, **self._loader_options())

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The same as validation."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """What training has consumed: plain Python of constant size, the same on every rank."""
        return self._sampler.state_dict() if self._sampler else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes training back to where the checkpoint was; nothing to do when there is no training."""
        if self._sampler:
            self._sampler.load_state_dict(state_dict)

    @property
    def _mixture(self) -> MixtureSampler:
        if self._sampler is None:
            raise RuntimeError("The training data is not set up: call setup('fit') first.")
        return self._sampler

    def _open_caches(self) -> dict[str, TokenCache]:
        root = cache_root(self.cache_dir)
        tokenizer_id = tokenizer_identity(self.tokenizer)
        # All entries first, so that a missing file is found before anything is tokenized.
        entries = {name: cache_entry(root, source, tokenizer_id, domain=name) for name, source in self.domains.items()}
        return {
            name: tokenize_once(self.domains[name], self.tokenizer, domain=name, directory=directory)
            for name, directory in entries.items()
        }

    def _split(self, name: str, cache: TokenCache) -> Split:
        whole = split_blocks(cache, block_size=self.block_size, validation=self.validation, domain=name)
        split = whole.limited(self.domains[name].max_blocks)
        capped = f" (max_blocks, of {whole.train.count:,})" if split is not whole else ""
        blank = f", {cache.blank:,} blank ones left out" if cache.blank else ""
        rank_zero_info(
            f"Domain {name!r}: {len(cache.tokens):,} tokens in {len(cache.ends):,} documents{blank}; "
            f"{split.train.count:,} training{capped} and {split.validation.count:,} validation blocks of "
            f"{self.block_size}, split {'between' if split.by_document else 'inside'} documents; "
            f"{split.dropped:,} tokens in the tails dropped."
        )
        return split

    def _new_sampler(self) -> MixtureSampler:
        blocks = {name: split.train.count for name, split in self._splits.items()}
        num_replicas, rank = self._replicas()
        if sum(blocks.values()) < self.batch_size * num_replicas:
            raise ConfigError(
                f"All domains together have {sum(blocks.values())} training blocks, too few for one batch of "
                f"{self.batch_size} on {num_replicas} rank(s): lower data.batch_size or data.block_size."
            )
        return MixtureSampler(
            blocks,
            weights=self.initial_weights or blocks,
            batch_size=self.batch_size,
            num_replicas=num_replicas,
            rank=rank,
            seed=self.seed,
            lead=self.num_workers * _PREFETCH,
        )

    def _replicas(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "prefetch_factor": _PREFETCH if self.num_workers else None,
            "worker_init_fn": outlive_preemption,
            "pin_memory": torch.cuda.is_available(),
            # Its own: making an iterator must not touch the global random state, for a resumed run makes more of them.
            "generator": torch.Generator().manual_seed(self.seed),
        }
