"""`CausalLM` against Hugging Face's own loss, and against plain loops."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from lightprune.anatomy import anatomy_of
from lightprune.data import Source, TextDataModule
from lightprune.errors import ConfigError
from lightprune.metrics import token_losses
from lightprune.module import CausalLM
from tests.data.conftest import byte_tokenizer

VOCAB, LENGTH, DOMAINS = 32, 12, ["code", "web"]

CONFIGS: dict[str, tuple[type[PreTrainedModel], PretrainedConfig]] = {
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=True,
        ),
    ),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=32,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
    ),
    "opt": (
        OPTForCausalLM,
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            max_position_embeddings=32,
            dropout=0.0,
        ),
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A directory for each family."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, (model, config) in CONFIGS.items():
        model(config).save_pretrained(root / name)
    return {name: str(root / name) for name in CONFIGS}


@pytest.fixture(params=CONFIGS)
def path(request: pytest.FixtureRequest, saved: dict[str, str]) -> str:
    return saved[request.param]


def draw_batch(size: int, seed: int) -> dict[str, torch.Tensor]:
    """Left-padded samples with ignored labels here and there."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (size, LENGTH), generator=random)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    labels = ids.masked_fill(torch.rand(ids.shape, generator=random) < 0.3, -100)
    labels[mask == 0] = -100
    domain = torch.randint(len(DOMAINS), (size,), generator=random)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "domain": domain}


BATCHES = [draw_batch(size, seed) for seed, size in enumerate((3, 1, 4))]


class Data(L.LightningDataModule):
    domain_names = DOMAINS

    def loader(self) -> "DataLoader[Any]":
        return DataLoader(BATCHES, batch_size=None)  # type: ignore[arg-type]

    train_dataloader = val_dataloader = test_dataloader = loader


def make_trainer(**options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**quiet | options)


def built(path: str, **options: Any) -> CausalLM:
    module = CausalLM(path, **options)
    module.configure_model()
    return module


def training_loss(module: CausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return module.training_step(batch, 0)["loss"]


def test_token_losses_equal_a_loop() -> None:
    batch = BATCHES[2]
    logits = torch.randn(4, LENGTH, VOCAB, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    sums, counts = token_losses(logits, batch["labels"])

    for row in range(4):
        losses = [
            math.log(sum(math.exp(x) for x in logits[row, t].tolist())) - logits[row, t, label].item()
            for t in range(LENGTH - 1)
            if (label := int(batch["labels"][row, t + 1])) != -100
        ]
        assert sums[row].item() == pytest.approx(math.fsum(losses), rel=1e-6)
        assert counts[row].item() == len(losses)


def test_loss_and_gradients_equal_those_of_transformers(path: str) -> None:
    module, batch = built(path), BATCHES[0]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}

    def gradients() -> dict[str, torch.Tensor]:
        taken = {n: p.grad.clone() for n, p in module.lm.named_parameters() if p.grad is not None}
        module.lm.zero_grad()
        return taken

    expected = module.lm(**inputs).loss
    expected.backward()
    expected_gradients = gradients()
    loss = training_loss(module, batch)
    loss.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    ours = gradients()
    assert ours.keys() == expected_gradients.keys() == dict(module.lm.named_parameters()).keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-5, atol=1e-7)


def test_gradient_checkpointing_changes_nothing(path: str) -> None:
    plain, checkpointed = built(path), built(path, gradient_checkpointing=True)
    for module, forwards in ((plain, 1), (checkpointed, 2)):
        calls: list[None] = []
        inside = next(anatomy_of(module.lm).layers[0].children())
        inside.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        training_loss(module, BATCHES[0]).backward()
        assert len(calls) == forwards

    for ours, theirs in zip(plain.lm.parameters(), checkpointed.lm.parameters(), strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_batch_without_labels_trains_on_nothing(saved: dict[str, str]) -> None:
    module, batch = built(saved["llama"]), dict(BATCHES[0])
    batch["labels"] = torch.full_like(batch["labels"], -100)

    loss = training_loss(module, batch)
    loss.backward()

    assert loss.item() == 0.0
    assert all(not p.grad.any() for p in module.lm.parameters() if p.grad is not None)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_metrics_per_domain_equal_a_loop(path: str, stage: str) -> None:
    module, trainer = CausalLM(path), make_trainer()
    run = trainer.validate if stage == "val" else trainer.test
    (logged,) = run(module, datamodule=Data(), verbose=False)

    losses: dict[str, list[float]] = {name: [] for name in DOMAINS}
    with torch.no_grad():
        for batch in BATCHES:
            logits = module.lm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            for row, domain in enumerate(batch["domain"].tolist()):
                log_probs = logits[row].double().log_softmax(-1)
                losses[DOMAINS[domain]] += [
                    -log_probs[t, label].item()
                    for t in range(LENGTH - 1)
                    if (label := int(batch["labels"][row, t + 1])) != -100
                ]
    expected = {f"/{name}": math.fsum(values) / len(values) for name, values in losses.items()}
    everything = [value for values in losses.values() for value in values]
    expected[""] = math.fsum(everything) / len(everything)
    assert set(logged) == {f"{stage}/{kind}{suffix}" for kind in ("loss", "ppl") for suffix in expected}
    for suffix, loss in expected.items():
        assert logged[f"{stage}/loss{suffix}"] == pytest.approx(loss, rel=1e-6)
        assert logged[f"{stage}/ppl{suffix}"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_without_domain_names_only_totals(saved: dict[str, str]) -> None:
    module = CausalLM(saved["llama"])
    loader = DataLoader([{"input_ids": b["input_ids"], "labels": b["labels"]} for b in BATCHES], batch_size=None)

    (logged,) = make_trainer().validate(module, loader, verbose=False)

    assert set(logged) == {"val/loss", "val/ppl"}


def test_fit_follows_a_plain_loop(saved: dict[str, str]) -> None:
    """Same batches, optimizer and per-step schedule as a loop around transformers' own loss."""
    module = CausalLM(
        saved["llama"],
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=6),
    )
    trainer = make_trainer(max_epochs=2, limit_val_batches=0)
    trainer.fit(module, datamodule=Data())

    lm = LlamaForCausalLM.from_pretrained(saved["llama"]).train()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=6)
    for batch in 2 * BATCHES:
        loss = lm(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()

    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for ours, theirs in zip(module.lm.parameters(), lm.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("path", "block_size", "sentence"),
    [
        ("llama", 8, r"The tokenizer has 257 tokens, and the model embeds 32: set data.tokenizer"),
        ("wide gpt2", 33, r"data.block_size is 33, and the model's context has 32 positions: set it to at most that"),
    ],
)
def test_data_that_the_model_cannot_read(
    path: str, block_size: int, sentence: str, saved: dict[str, str], tmp_path: Path
) -> None:
    model, config = CONFIGS["gpt2"]
    model(GPT2Config(**config.to_dict() | {"vocab_size": 257})).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "text.txt").write_text("All the world is a stage. " * 20)
    data = TextDataModule(
        {"plays": Source(files=str(tmp_path / "text.txt"))},
        byte_tokenizer(),
        block_size=block_size,
        batch_size=1,
        validation=1,
        num_workers=0,
        cache_dir=str(tmp_path / "cache"),
    )
    with pytest.raises(ConfigError, match=sentence):
        make_trainer(max_steps=1).fit(CausalLM(saved.get(path, str(tmp_path / "gpt2"))), datamodule=data)


def test_the_model_is_built_once_and_not_before_fit(saved: dict[str, str]) -> None:
    module = CausalLM(saved["llama"])
    assert not list(module.parameters())
    make_trainer(max_steps=1).fit(module, datamodule=Data())
    lm = module.lm
    make_trainer().validate(module, datamodule=Data(), verbose=False)

    assert module.lm is lm
    assert lm.config.use_cache


def test_resumes_from_a_checkpoint(saved: dict[str, str], tmp_path: Path) -> None:
    module = CausalLM(saved["llama"])
    trainer = make_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(module, datamodule=Data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    loaded = CausalLM.load_from_checkpoint(tmp_path / "last.ckpt", model=saved["llama"])

    for ours, theirs in zip(loaded.parameters(), module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture
def yaml(saved: dict[str, str], tmp_path: Path) -> str:
    config = tmp_path / "model.yaml"
    config.write_text(f"""
model:
  class_path: lightprune.module.CausalLM
  init_args:
    model: {saved["llama"]}
    dtype: bfloat16
    optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: 0.25}}}}
    lr_scheduler: {{class_path: torch.optim.lr_scheduler.StepLR, init_args: {{step_size: 1, gamma: 0.5}}}}
trainer: {{accelerator: cpu, max_steps: 2, limit_val_batches: 0, logger: false, enable_checkpointing: false,
           enable_progress_bar: false, enable_model_summary: false}}
""")
    return str(config)


def test_optimizer_and_scheduler_from_yaml(yaml: str) -> None:
    cli = LightningCLI(
        L.LightningModule,
        Data,
        subclass_mode_model=True,
        save_config_callback=None,
        args=["fit", "--config", yaml],
    )

    (optimizer,) = cli.trainer.optimizers
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["lr"] == 0.25 * 0.5**2
    assert {p.dtype for p in cli.model.parameters()} == {torch.bfloat16}
