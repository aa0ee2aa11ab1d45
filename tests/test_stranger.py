"""What somebody else wrote, in a package outside lightprune: a family, a selector, a regularizer and a strategy.

`tests/stranger` is that package. Here it trains, resumes and exports, from Python and from a config.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from transformers import AutoModelForCausalLM, StableLmConfig, StableLmForCausalLM

import lightprune as lp
from lightprune.testing import check_family
from tests.resume_run import Shuffled
from tests.training import Plain, assert_equal, byte_tokenizer, trainer_for, weights

ROOT = Path(__file__).parents[1]
STOP, CUT, STEPS, KEPT = 3, 6, 9, 24


def config(vocab_size: int = 64) -> StableLmConfig:
    return StableLmConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_qkv_bias=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def model(vocab_size: int = 64) -> StableLmForCausalLM:
    torch.manual_seed(0)
    return StableLmForCausalLM(config(vocab_size))


def test_without_the_package_nothing_of_it_is_known() -> None:
    """In a process of its own: the family is refused by name, before the first step."""
    script = """
import lightning as L, lightprune as lp
from tests.test_stranger import Plain, Shuffled, model
callbacks = [lp.RandomSelector(drop=1), lp.StructuredCut(at=1)]
trainer = L.Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=callbacks)
try:
    trainer.fit(Plain(model()), Shuffled(4))
except lp.ConfigError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert "stablelm" in said.stdout.lower(), said.stderr[-2000:]


def test_the_family_passes_its_check() -> None:
    import tests.stranger as stranger

    assert len(check_family(stranger.STABLELM, config())) >= 3


class Stop(Callback):
    """Ends the fit as so many optimizer steps are over."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            raise InterruptedError


def run(folder: Path, *others: Callback, ckpt_path: str | None = None) -> tuple[Plain, L.Trainer]:
    import tests.stranger as stranger

    parts = [
        stranger.RangeSelector(channels=KEPT, stop=STOP),
        stranger.ShrinkChannels(strength=0.1),
        lp.StructuredCut(at=CUT),
        lp.Recovery(lr=2e-3),
        ModelCheckpoint(folder, every_n_train_steps=1, save_last=True, save_top_k=0),
        lp.ExportHF(str(folder / "hf")),
    ]
    trainer = trainer_for(
        [*others, *parts], STEPS, strategy=stranger.PlainStrategy(), enable_checkpointing=True, default_root_dir=folder
    )
    module = Plain(model())
    trainer.fit(module, Shuffled(STEPS), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return module, trainer


@pytest.mark.parametrize("stopped", [2, 4, 7], ids=["in the window", "before the cut", "after the cut"])
def test_fit_resume_export(tmp_path: Path, stopped: int) -> None:
    module, trainer = run(tmp_path / "whole")
    assert trainer.strategy.preparations == 2  # once more after the cut
    assert module.lm.config.intermediate_size == KEPT
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "hf").eval()
    assert isinstance(exported, StableLmForCausalLM)
    ids = torch.randint(3, 64, (2, 12))
    torch.testing.assert_close(exported(ids).logits, module.lm.eval().cpu()(ids).logits)

    with pytest.raises(InterruptedError):
        run(tmp_path / "again", Stop(stopped))
    again, _ = run(tmp_path / "again", ckpt_path="last")
    assert_equal(weights(module.lm), weights(again.lm))


def test_from_a_config(tmp_path: Path) -> None:
    """`class_path` imports the package, and with it comes all that it registers."""
    tokenizer = byte_tokenizer()
    model(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "plays.txt").write_text("All the world is a stage, and the men and women merely players. " * 60)
    settings = {
        "trainer": {
            "strategy": {"class_path": "tests.stranger.PlainStrategy"},
            "max_steps": STEPS,
            "callbacks": [
                {"class_path": "tests.stranger.RangeSelector", "init_args": {"channels": 0.5, "multiple_of": 8}},
                {"class_path": "tests.stranger.ShrinkChannels"},
                {"class_path": "lightprune.StructuredCut", "init_args": {"at": CUT}},
                {"class_path": "lightprune.ExportHF", "init_args": {"path": "pruned"}},
            ],
        },
        "model": {"class_path": "lightprune.CausalLM", "init_args": {"model": "model"}},
        "data": {
            "class_path": "lightprune.data.TextDataModule",
            "init_args": {
                "domains": {"plays": {"files": "plays.txt"}},
                "block_size": 16,
                "batch_size": 2,
                "num_workers": 0,
                "cache_dir": "cache",
            },
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    for command in (["plan"], ["fit"]):
        done = subprocess.run(
            [sys.executable, "-m", "lightprune", *command, "--config", "config.yaml"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    written = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert (written["model_type"], written["intermediate_size"]) == ("stablelm", KEPT)
