import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import lightprune.data.domains
import lightprune.data.module
from lightprune.data import Source, TextDataModule
from lightprune.errors import ConfigError
from tests.data.conftest import EOS, byte_tokenizer, rows_of

BLOCK, BATCH = 8, 2
STREAM = {"s": Source(files="never/read.jsonl", streaming=True)}


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of different characters: 20 documents of 11 tokens, and 30 of 5."""
    directory = tmp_path_factory.mktemp("texts")
    (directory / "upper.txt").write_text("|".join("A" * 8 + f"{i:02d}" for i in range(20)))
    (directory / "lower.txt").write_text("|".join("b" * 2 + f"{i:02d}" for i in range(30)))
    return directory


def data(texts: Path, **options: Any) -> TextDataModule:
    domains = {name: Source(files=str(texts / f"{name}.txt"), separator="|") for name in ("upper", "lower")}
    defaults = {
        "domains": domains,
        "tokenizer": byte_tokenizer(),
        "block_size": BLOCK,
        "batch_size": BATCH,
        "validation": 2,
        "num_workers": 0,
        "cache_dir": str(texts / "cache"),
    }
    return TextDataModule(**(defaults | options))


def fingerprint(batch: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(batch[key].numpy().tobytes() for key in sorted(batch))).hexdigest()[:12]


class Recorder(pl.LightningModule):
    """Writes down every batch that it trains on."""

    def __init__(self, *, early: bool = False) -> None:
        super().__init__()
        self.early = early
        self.seen: list[tuple[int, str]] = []
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, fingerprint(batch)))
        return self.weight * torch.rand(())

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.early:
            assert self.trainer.estimated_stepping_batches > 0  # makes the loader before the state is restored
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ChangeWeights(pl.Callback):
    """Now and then; a callback, for Lightning saves checkpoints after these and before the module's own hook."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step % 5 == 0:
            trainer.datamodule.set_weights({"upper": 1, "lower": trainer.global_step % 4})


def fit(
    module: pl.LightningModule, datamodule: TextDataModule, root: Path, ckpt_path: Path | None = None, **options: Any
) -> pl.Trainer:
    trainer = pl.Trainer(
        **{
            "default_root_dir": root,
            "max_epochs": 3,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 1,
            "val_check_interval": 3,
        }
        | options
    )
    trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.filterwarnings("error:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize(
    ("num_workers", "early", "stops", "val_check_interval"),
    [(0, False, (*range(1, 60, 7), 20, 40), 3), (0, True, (5, 20), 3), (2, False, (11,), 10)],
)
def test_a_resumed_fit_sees_exactly_the_batches_that_were_left(
    texts: Path, tmp_path: Path, num_workers: int, early: bool, stops: tuple[int, ...], val_check_interval: int
) -> None:
    whole = Recorder(early=early)
    every_step = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = fit(
        whole,
        data(texts, num_workers=num_workers),
        tmp_path,
        callbacks=[ChangeWeights(), every_step],
        val_check_interval=val_check_interval,
    )
    epoch = trainer.num_training_batches
    assert [number for number, _ in whole.seen] == [e for e in range(3) for _ in range(epoch)]
    assert len({batch for _, batch in whole.seen}) > 20
    assert epoch == 20
    for stop in stops:
        resumed = Recorder(early=early)
        checkpoint = tmp_path / f"step={stop}.ckpt"
        fit(
            resumed,
            data(texts, num_workers=num_workers),
            tmp_path,
            checkpoint,
            callbacks=[ChangeWeights()],
            val_check_interval=val_check_interval,
            enable_checkpointing=False,
        )
        assert [b for _, b in resumed.seen] == [b for _, b in whole.seen[stop:]], stop


def streams(texts: Path, cache: Path, **options: Any) -> TextDataModule:
    """A stream of 22 blocks beside a domain that is tokenized up front."""
    domains = {
        "upper": Source(files=str(texts / "upper.txt"), separator="|", streaming=True),
        "lower": Source(files=str(texts / "lower.txt"), separator="|"),
    }
    weights = {"upper": 2, "lower": 1}
    return data(texts, domains=domains, weights=weights, cache_dir=str(cache), **options)


@pytest.mark.parametrize(
    ("num_workers", "stops", "bos"), [(0, (1, 8, 33), None), (2, (7,), None), (0, (8, 33), "<bos>")]
)
def test_a_resumed_fit_on_streams_is_exact_with_and_without_the_cache(
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_workers: int,
    stops: tuple[int, ...],
    bos: str | None,
) -> None:
    monkeypatch.setattr(lightprune.data.domains, "WINDOW", 5)
    options = {"max_steps": 60, "val_check_interval": 30, "check_val_every_n_epoch": None}
    whole = Recorder()
    every_step = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    tokenizer = byte_tokenizer(bos=bos)
    first = streams(texts, tmp_path / "cache", num_workers=num_workers, tokenizer=tokenizer)
    fit(whole, first, tmp_path, callbacks=[ChangeWeights(), every_step], **options)
    assert first.epochs_seen["upper"] > 2, "the stream has ended and begun again"
    for stop in stops:
        for cache in ("cache", f"fresh-{stop}"):
            resumed = Recorder()
            datamodule = streams(texts, tmp_path / cache, num_workers=2 - num_workers, tokenizer=tokenizer)
            callbacks = {"callbacks": [ChangeWeights()], "enable_checkpointing": False}
            fit(resumed, datamodule, tmp_path, tmp_path / f"step={stop}.ckpt", **callbacks, **options)
            assert [b for _, b in resumed.seen] == [b for _, b in whole.seen[stop:]], (stop, cache)


def test_a_stream_shows_all_its_text_once_an_epoch_and_holds_its_beginning_out(texts: Path, tmp_path: Path) -> None:
    source = Source(files=str(texts / "upper.txt"), separator="|", streaming=True)
    datamodule = data(texts, domains={"upper": source}, weights={"upper": 1}, batch_size=1, cache_dir=str(tmp_path))
    datamodule.setup("fit")
    stream = [token for i in range(20) for token in [*b"AAAAAAAA", *f"{i:02d}".encode(), EOS]]
    held_out = [stream[i : i + BLOCK] for i in (0, 8)]
    # Two blocks are asked for, 16 tokens; the next document ends at 22.
    train = [stream[i : i + BLOCK] for i in range(22, len(stream) - BLOCK + 1, BLOCK)]
    assert plain_tokens(datamodule.val_dataloader()) == held_out
    batches = iter(datamodule.train_dataloader())
    epochs = [plain_tokens(next(batches) for _ in train) for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(train)] * 2
    assert epochs[0] != epochs[1] != train
    assert datamodule.tokens_seen == {"upper": 2 * len(train) * BLOCK}
    assert datamodule.epochs_seen == {"upper": 2.0}


def test_training_on_a_stream_begins_before_it_is_tokenized(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lightprune.data.domains, "WINDOW", 16)
    path = tmp_path / "long.jsonl"
    with path.open("w") as file:
        file.writelines(f'{{"text": "{i:07d}{"x" * 92}"}}\n' for i in range(20_000))  # 100 tokens each, 2M in all
    domains = {"long": Source(files=str(path), streaming=True)}
    datamodule = data(texts, domains=domains, weights={"long": 1}, num_workers=1, cache_dir=str(tmp_path / "cache"))
    datamodule.setup("fit")
    batches = iter(datamodule.train_dataloader())
    for _ in range(10):
        next(batches)
    (progress,) = (tmp_path / "cache").rglob("progress.json")
    assert 20 * BLOCK < json.loads(progress.read_text())["tokens"] < 20_000
    assert len(datamodule.train_dataloader()) == 2**20 // BATCH


def test_a_second_fit_starts_from_the_beginning(texts: Path, tmp_path: Path) -> None:
    datamodule = data(texts)
    first, second = Recorder(), Recorder()
    for module in (first, second):
        fit(module, datamodule, tmp_path, max_steps=9, enable_checkpointing=False)
    assert first.seen == second.seen


def test_epochs_may_be_shortened(texts: Path, tmp_path: Path) -> None:
    whole, short = Recorder(), Recorder()
    fit(whole, data(texts), tmp_path, max_steps=12, enable_checkpointing=False)
    fit(short, data(texts), tmp_path, limit_train_batches=4, enable_checkpointing=False)
    assert [batch for _, batch in short.seen] == [batch for _, batch in whole.seen]
    assert [epoch for epoch, _ in short.seen] == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loaders_leave_the_global_random_state_alone(texts: Path, num_workers: int) -> None:
    datamodule = data(texts, num_workers=num_workers)
    datamodule.setup("fit")
    before = torch.get_rng_state()
    next(iter(datamodule.train_dataloader()))
    next(iter(datamodule.val_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)


def plain_tokens(batches: Any) -> list[list[int]]:
    return [row for batch in batches for row in batch["input_ids"].tolist()]


def test_training_and_validation_share_no_document(texts: Path) -> None:
    datamodule = data(texts)
    datamodule.setup("fit")
    splits = datamodule._opened
    for name, character, documents, size in (("upper", b"A", 20, 11), ("lower", b"b", 30, 5)):
        held_out = [token for row in rows_of(splits[name].validation) for token in row]
        train = [token for row in rows_of(splits[name].train) for token in row]
        numbers = [set(re.findall(rb"\d\d", bytes(t for t in side if t != EOS))) for side in (train, held_out)]
        assert not numbers[0] & numbers[1]
        assert character[0] in held_out
        assert 0 <= documents * size - len(train) - len(held_out) < 2 * BLOCK
    validation = list(datamodule.val_dataloader())
    assert plain_tokens(validation) == [
        row for name in datamodule.domain_names for row in rows_of(splits[name].validation)
    ]
    domains = torch.cat([batch["domain"] for batch in validation]).tolist()
    assert domains == sorted(domains)
    assert set(domains) == {0, 1}
    assert plain_tokens(datamodule.test_dataloader()) == plain_tokens(validation)


def test_a_batch(texts: Path) -> None:
    datamodule = data(texts, batch_size=3, num_workers=1)
    datamodule.setup("fit")
    loader = datamodule.train_dataloader()
    assert loader.batch_sampler.batch_size == 3, "DeepSpeed's set-up reads it there"
    batch = next(iter(loader))
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        "input_ids": ((3, BLOCK), torch.int64),
        "attention_mask": ((3, BLOCK), torch.int64),
        "labels": ((3, BLOCK), torch.int64),
        "domain": ((3,), torch.int64),
    }
    assert torch.equal(batch["input_ids"], batch["labels"])
    for tokens, domain in zip(batch["input_ids"], batch["domain"], strict=True):
        assert (ord("A") in tokens) == (int(domain) == 0)


def test_default_weights_draw_every_block_equally_often(texts: Path) -> None:
    datamodule = data(texts)
    datamodule.setup("fit")
    assert datamodule.weights == {name: domain.supply.count for name, domain in datamodule._opened.items()}


def test_the_block_size_and_the_split_need_no_second_tokenization(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data(texts, cache_dir=str(tmp_path)).prepare_data()
    entries = sorted(tmp_path.rglob("tokens.npy"))
    assert len(entries) == 2
    monkeypatch.setattr(Source, "documents", None)
    other = data(texts, cache_dir=str(tmp_path), block_size=5, validation=0.3, seed=4)
    other.prepare_data()
    other.setup("fit")
    assert sorted(tmp_path.rglob("tokens.npy")) == entries


def test_the_log_says_what_was_dropped(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(lightprune.data.domains, "rank_zero_info", lines.append)
    datamodule = data(texts, domains={"u": Source(files=str(texts / "upper.txt"), separator="|", max_blocks=9)})
    datamodule.setup("fit")
    train = 220 - 22  # two documents hold 22 tokens, at least the two blocks of 8 that were asked for
    assert lines == [
        f"Domain 'u': 220 tokens in 20 documents; 9 training (max_blocks, of {train // 8}) and 2 validation blocks of "
        f"8, split between documents; {train % 8 + 22 % 8} tokens in the tails dropped."
    ]


def test_the_tokenizer_may_come_from_the_module_or_by_name(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    monkeypatch.setattr(lightprune.data.module, "load_tokenizer", {"org/model": tokenizer}.__getitem__)
    assert data(texts, tokenizer="org/model").tokenizer is tokenizer
    module = Recorder()
    module.tokenizer = tokenizer
    datamodule = data(texts, tokenizer=None)
    fit(module, datamodule, tmp_path, max_steps=1, enable_checkpointing=False)
    assert datamodule.tokenizer is tokenizer


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"domains": {}}, "data.domains is empty, but must name at least one domain."),
        ({"domains": {"x": Source()}}, "data.domains.x needs exactly one of"),
        ({"domains": {"x": {}}}, "data.domains.x needs exactly one of"),
        ({"domains": {"x": {"file": "a"}}}, "data.domains.x.file is unknown: the keys of a domain are hub, saved, fi"),
        ({"domains": {"x": "a.txt"}}, "data.domains.x is 'a.txt': it must be a Source, or a dictionary with some of"),
        ({"domains": ["a.txt"]}, "data.domains is ['a.txt'], but must be a dictionary of sources by the domains' na"),
        ({"domains": {1: {"files": "a"}}}, "data.domains has the name 1: a domain's name must be a text."),
        ({"block_size": 1}, "data.block_size is 1: it must be at least 2."),
        ({"batch_size": 0}, "data.batch_size is 0: it must be at least 1."),
        ({"num_workers": -1}, "data.num_workers is -1: it must be at least 0."),
        ({"seed": -1}, "data.seed is -1: it must be at least 0 and at most 4294967295."),
        ({"block_size": 8.5}, "data.block_size is 8.5: it must be a whole number"),
        ({"validation": 0}, "data.validation is 0, but must be a share between 0 and 1, or a number of blocks from 1."),
        ({"validation": 1.0}, "data.validation is 1.0, but must be a share"),
        ({"validation": "0.1"}, "data.validation is '0.1', but must be a share"),
        ({"validation": True}, "data.validation is True, but must be a share"),
        ({"weights": {"upper": 1, "lower": "1"}}, "data.weights.lower is '1', but must be 0 or a positive number."),
        (
            {"weights": {"upper": 1, "lower": 1, "x": 1}},
            "data.weights names 'x', but data.domains has only: upper, lower.",
        ),
        ({"weights": {"upper": 1, "lower": -1}}, "data.weights.lower is -1"),
        ({"weights_lag": -1, "num_workers": 0}, "data.weights_lag is -1: it must be at least 0."),
        ({"num_workers": 9}, "data.num_workers is 9, but must be at most data.weights_lag = 8, since each worker"),
        (
            {"domains": STREAM, "weights": None},
            "data.weights is null, which weighs domains by their size, but data.",
        ),
        (
            {"domains": STREAM, "weights": {"s": 1}, "validation": 0.1},
            "data.validation is 0.1, a share, but data.domains.s is a stream, whose size is not known: give a number",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_at_construction(
    texts: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        data(texts, tokenizer="never/loaded", **options)


def test_what_the_text_does_not_allow_is_refused_at_setup(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^All domains together have 3 training blocks, too few for one batch of 4 on 1"
    ):
        data(texts, block_size=60, batch_size=4, validation=1).setup("fit")
    with pytest.raises(ConfigError, match=r"^The tokenizer has no EOS token .* in data.tokenizer\.$"):
        data(texts, tokenizer=byte_tokenizer(eos=False)).setup("fit")
    with pytest.raises(ConfigError, match=r"^data.tokenizer is null, and the model brings none"):
        data(texts, tokenizer=None).setup("fit")
    with pytest.raises(ConfigError, match=r"^data.domains.upper has 220 tokens, fewer than the 20 blocks of 11 that"):
        streams(texts, tmp_path, validation=20, block_size=11).setup("fit")


def test_a_domain_may_be_a_plain_dictionary(texts: Path) -> None:
    path = texts / "upper.txt"
    sources = [Source(files=str(path), separator="|"), {"files": path, "separator": "|"}]
    modules = [data(texts, domains={"d": source}) for source in sources]
    assert modules[0].domains == modules[1].domains
    modules[1].setup("fit")
    assert modules[1].epochs_seen == {"d": 0.0}


def test_a_missing_file_is_found_before_anything_is_tokenized(texts: Path, tmp_path: Path) -> None:
    domains = {"there": Source(files=str(texts / "upper.txt")), "not": Source(files=str(texts / "none.txt"))}
    with pytest.raises(ConfigError, match=r"^data.domains.not.files is .* no such file\.$"):
        data(texts, domains=domains, cache_dir=str(tmp_path / "cache")).prepare_data()
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"The cache of tokens '.*file/cache' cannot be made \(.*data.cache_dir"):
        data(texts, cache_dir=str(tmp_path / "file" / "cache")).prepare_data()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("change", ["text", "block size"])
def test_a_resume_on_as_many_other_blocks_is_refused(change: str, streaming: bool, tmp_path: Path) -> None:
    """`max_blocks` makes the count the same."""

    def state_of(text: str, block_size: int) -> tuple[TextDataModule, dict[str, Any]]:
        (tmp_path / f"{text}.jsonl").write_text("\n".join(json.dumps({"text": f"{text} {i}"}) for i in range(400)))
        source = Source(files=str(tmp_path / f"{text}.jsonl"), max_blocks=20, streaming=streaming)
        module = data(tmp_path, domains={"d": source}, weights={"d": 1}, block_size=block_size)
        module.prepare_data()
        module.setup("fit")
        return module, module.state_dict()

    _, state = state_of("one", 8)
    other, _ = state_of("two", 8) if change == "text" else state_of("one", 16)
    same, _ = state_of("one", 8)
    same.load_state_dict(state)
    with pytest.raises(ConfigError, match=r"written with data.domains = .* resume with the same data"):
        other.load_state_dict(state)


def test_a_worker_that_hangs_is_given_up(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightprune.data.module, "WORKER_TIMEOUT", 1)
    monkeypatch.setattr(lightprune.data.module, "outlive_preemption", lambda worker_id: time.sleep(30))
    module = data(texts, num_workers=1)
    module.prepare_data()
    module.setup("fit")
    with pytest.raises(RuntimeError, match="timed out after 1 seconds"):
        next(iter(module.train_dataloader()))
