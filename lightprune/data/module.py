"""`TextDataModule`: named domains of text, packed into blocks and mixed by weight."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lightprune.data.blocks import BlockDataset, OrderedSampler
from lightprune.data.bos import Bos, bos_of
from lightprune.data.domains import Domain, open_domain, tokenize_domains
from lightprune.data.loader import MixtureLoader
from lightprune.data.mixture import MixtureSampler, check_weights
from lightprune.data.readers import key_of
from lightprune.data.sources import Source, sources_of
from lightprune.data.stream import TokenStream
from lightprune.data.tokens import TokenCache, cache_entry, cache_root, parts_of, tokenizer_identity
from lightprune.errors import ConfigError, check_number, is_finite, is_whole
from lightprune.hub import load_tokenizer
from lightprune.integrations.workers import outlive_preemption

WORKER_TIMEOUT = 30 * 60
"""Seconds that training waits for a batch before it gives up a worker: as long as ranks wait for one another."""


class TextDataModule(LightningDataModule):
    """Language-model batches from a weighted mixture of text domains.

    Each domain is tokenized once, into a cache on disk; EOS closes every document; the tokens are packed into blocks
    of `block_size`. The only tokens left out are the tails that do not fill a block (a log line says how many).
    Where the tokenizer puts BOS first, as those of Gemma, Llama and Mistral do, every document and every block begins
    with it (see `bos`).

    A batch holds `input_ids`, `attention_mask` and `labels`, [B, T] int64, and `domain`, [B] int64, an index into
    `domain_names`. Labels are the tokens themselves, not shifted. -100 is ignored: BOS, which a model is given and
    never has to predict, and samples that fill up an evaluation on several ranks.

    A domain whose source is `streaming` is tokenized while training consumes it, in constant memory. Its first blocks
    are held out, the others are shuffled in windows (`lightprune.data.stream`).

    Training draws domains by weight, without an end; an epoch is as many batches as the training blocks fill, where a
    stream counts as its `max_blocks` or else 2^20. What has been consumed is part of the checkpoint, and a resumed run
    goes on with exactly the next batch, on any number of workers, and on any number of ranks that take batches of the
    same size together. Validation (and test, which is the same) shows every held-out block once, all domains in one
    loader.

    Works the same with and without the Trainer's `use_distributed_sampler`.

    Args:
        domains: The source of each domain, by name: a `Source`, or a plain dictionary with the same names.
        tokenizer: Hub id, directory, GGUF file or `pkg://` URI, or a tokenizer; None takes the `tokenizer` of the
            LightningModule.
        block_size: Tokens in a block, T.
        batch_size: Blocks in a batch of one rank, B.
        weights: How often each domain is drawn, in any unit, 0 for never. None draws every block equally often, so
            that a domain weighs as much as it has blocks; a stream needs weights. A resumed run keeps the weights of
            its checkpoint.
        validation: What is held out of each domain, at least: a share of its blocks, or a number of blocks. Whole
            documents are held out where that comes to at most twice as much, and else the end of the text, which may
            cut one document in two. The same blocks for every `seed`. Of a stream it is the beginning, and a number.
        num_workers: Worker processes for each loader, at most `weights_lag`. Their number changes no batch. One that
            hangs for half an hour ends the run.
        weights_lag: After how many batches new weights act (`set_weights`): as far ahead of training may workers be.
        seed: Of the order in which blocks are drawn.
        cache_dir: None is the environment's `LIGHTPRUNE_CACHE`, or else `~/.cache/lightprune`. Nodes of one run should
            share it: rank 0 fills it, and a rank that finds nothing there tokenizes the text for itself.
        bos: Whether every document and every block begins with BOS, in training and in validation. None follows the
            tokenizer's own rule: whether `tokenizer(text)` puts it first. It takes a place in the block. A document at
            the beginning of a block has one BOS, not two. Where BOS and EOS are the same token (OPT), one of them
            stands between two documents.

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
        weights_lag: int = 8,
        seed: int = 0,
        cache_dir: str | None = None,
        bos: bool | None = None,
    ) -> None:
        super().__init__()
        # Nodes share the cache; by Lightning's default all of them would make it at once.
        self.prepare_data_per_node = False
        domains = sources_of(domains)
        if is_whole(validation):
            validation = int(validation)  # NumPy's, too, is a number of blocks and no share
        self._check_settings(domains, block_size, batch_size, weights, validation, num_workers, weights_lag, seed, bos)
        self.domains = domains
        self.domain_names = list(domains)
        self.block_size = block_size
        self.batch_size = batch_size
        self.initial_weights = weights
        self.validation = validation
        self.num_workers = num_workers
        self.weights_lag = weights_lag
        self.seed = seed
        self.cache_dir = cache_dir
        self.bos = bos
        self._tokenizer = tokenizer
        self._opened: dict[str, Domain] = {}
        self._sampler: MixtureSampler | None = None

    @staticmethod
    def _check_settings(
        domains: Mapping[str, Source],
        block_size: int,
        batch_size: int,
        weights: Mapping[str, float] | None,
        validation: int | float,
        num_workers: int,
        weights_lag: int,
        seed: int,
        bos: bool | None,
    ) -> None:
        check_number("data", "block_size", block_size, whole=True, least=2)  # one token predicts the next
        check_number("data", "batch_size", batch_size, whole=True, least=1)
        check_number("data", "num_workers", num_workers, whole=True, least=0)
        check_number("data", "weights_lag", weights_lag, whole=True, least=0)
        check_number("data", "seed", seed, whole=True, least=0, most=2**32 - 1)
        if num_workers > weights_lag:
            raise ConfigError(
                f"data.num_workers is {num_workers}, but must be at most data.weights_lag = {weights_lag}, since each "
                "worker prepares a batch in advance: lower it, or let new weights act later."
            )
        if not (validation >= 1 if is_whole(validation) else is_finite(validation) and 0 < validation < 1):
            raise ConfigError(
                f"data.validation is {validation!r}, but must be a share between 0 and 1, or a number of blocks from 1."
            )
        if bos is not None and not isinstance(bos, bool):
            raise ConfigError(f"data.bos is {bos!r}: it must be true, false, or null for the tokenizer's own rule.")
        streaming = [name for name, source in domains.items() if source.streaming]
        if streaming and not isinstance(validation, int):
            raise ConfigError(
                f"data.validation is {validation}, a share, but {key_of(streaming[0])} is a stream, whose size is "
                "not known: give a number of blocks."
            )
        if streaming and weights is None:
            raise ConfigError(
                f"data.weights is null, which weighs domains by their size, but {key_of(streaming[0])} is a "
                "stream, whose size is not known: give each domain a weight."
            )
        if weights is not None:
            check_weights(weights, list(domains))

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

    @property
    def tokens_seen(self) -> dict[str, int]:
        """How many tokens of each domain training has consumed, on all ranks together."""
        return {name: samples * self.block_size for name, samples in self._mixture.samples_seen.items()}

    @property
    def epochs_seen(self) -> dict[str, float]:
        """How often training has passed over each domain; 0 as long as the length of a stream is unknown."""
        return self._mixture.epochs_seen

    def prepare_data(self) -> None:
        """Tokenizes what is not in the cache yet, on rank 0 alone; streams wait for training.

        Text that a model writes waits for `setup`, if there are several ranks: all of them write.
        """
        self._tokens(written=self._replicas()[0] == 1)

    def setup(self, stage: str) -> None:
        """Opens the cache, and starts the training mixture from its beginning if `stage` is "fit"."""
        if not self._opened:
            self._write_together()
            tokens = self._tokens()
            options: dict[str, Any] = {"block_size": self.block_size, "validation": self.validation, "bos": self._bos}
            for name, source in self.domains.items():
                self._opened[name] = open_domain(tokens[name], name=name, max_blocks=source.max_blocks, **options)
        if stage == "fit":
            self._sampler = self._new_sampler()

    def train_dataloader(self) -> MixtureLoader:
        """The mixture. It has a length, but its iteration does not end by itself."""
        dataset = BlockDataset([domain.train for domain in self._opened.values()])
        return MixtureLoader(dataset, self._mixture, **self._loader_options())

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """All held-out blocks, one domain after another; a batch may hold two domains."""
        dataset = BlockDataset([domain.validation for domain in self._opened.values()])
        num_replicas, rank = self._replicas()
        counts = [domain.held_out for domain in self._opened.values()]
        sampler = OrderedSampler(counts, num_replicas=num_replicas, rank=rank)
        return DataLoader(dataset, sampler=sampler, batch_size=self.batch_size, **self._loader_options())

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The same as validation."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """What training has consumed: plain Python of constant size, the same on every rank."""
        return self._sampler.state_dict() if self._sampler else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes training back to where the checkpoint was; does nothing when nothing trains."""
        if self._sampler:
            self._sampler.load_state_dict(state_dict)

    @property
    def _mixture(self) -> MixtureSampler:
        if self._sampler is None:
            raise RuntimeError("The training data is not set up: call setup('fit') first.")
        return self._sampler

    def _tokens(self, *, written: bool = True) -> dict[str, TokenCache | TokenStream]:
        """The tokens of all domains, or of those alone whose text is not `written` by a model."""
        sources = self._sources(self.trainer and self.trainer.lightning_module)
        sources = {name: source for name, source in sources.items() if written or source.generated is None}
        return tokenize_domains(sources, self.tokenizer, cache=cache_root(self.cache_dir), bos=self._bos)

    def _write_together(self) -> None:
        """Where there are several ranks, let all of them write the text that is generated; one tokenizes it."""
        trainer = self.trainer
        if trainer is None or trainer.world_size == 1 or all(s.generated is None for s in self.domains.values()):
            return
        identity = tokenizer_identity(self.tokenizer, self._bos)
        for name, source in self._sources(trainer.lightning_module).items():
            directory = cache_entry(cache_root(self.cache_dir), source, identity, domain=name)
            if source.generated is not None and not directory.exists():
                share = {"place": trainer.global_rank, "places": trainer.world_size}
                source.generated.write_share(self.tokenizer, parts_of(directory), name, **share)
        trainer.strategy.barrier("generated text is written")
        if trainer.is_global_zero:
            self._tokens()
        trainer.strategy.barrier("generated text is tokenized")

    def _sources(self, module: object) -> dict[str, Source]:
        """The sources; generated text is written by the model that `module` loads, unless another one is named."""
        model = getattr(module, "model", None)
        writer = model if isinstance(model, str) else None
        return {name: source.written_by(writer, name) for name, source in self.domains.items()}

    def generate(self, module: object) -> dict[str, TokenCache]:
        """Writes the text of the domains that a model writes into the cache, unless it is there.

        Args:
            module: Names the model in its attribute `model`, for domains that name none.

        Returns:
            The tokens of each of these domains.

        Raises:
            ConfigError: There is no such domain, or no model.
        """
        written = {name: source for name, source in self._sources(module).items() if source.generated is not None}
        if not written:
            raise ConfigError("No domain of data.domains is generated: give one the source `generated: {}`.")
        if self._tokenizer is None:
            self._tokenizer = getattr(module, "tokenizer", None)
        tokens = tokenize_domains(written, self.tokenizer, cache=cache_root(self.cache_dir), bos=self._bos)
        return {name: domain for name, domain in tokens.items() if isinstance(domain, TokenCache)}

    @cached_property
    def _bos(self) -> Bos | None:
        return bos_of(self.tokenizer, self.bos)

    def _new_sampler(self) -> MixtureSampler:
        supplies = {name: domain.supply for name, domain in self._opened.items()}
        num_replicas, rank = self._replicas()
        sampler = MixtureSampler(
            supplies,
            weights=self.initial_weights or {name: float(supply.nominal) for name, supply in supplies.items()},
            batch_size=self.batch_size,
            num_replicas=num_replicas,
            rank=rank,
            seed=self.seed,
            weights_lag=self.weights_lag,
        )
        if len(sampler) < self.batch_size:
            blocks = sum(supply.nominal for supply in supplies.values())
            raise ConfigError(
                f"All domains together have {blocks} training blocks, too few for one batch of "
                f"{self.batch_size} on {num_replicas} rank(s): lower data.batch_size or data.block_size."
            )
        return sampler

    def _replicas(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "timeout": WORKER_TIMEOUT if self.num_workers else 0,
            "worker_init_fn": outlive_preemption,
            "pin_memory": torch.cuda.is_available(),
            # Its own: making an iterator must not touch the global random state, for a resumed run makes more of them.
            "generator": torch.Generator().manual_seed(self.seed),
        }
