"""Nothing that was trained is lost: interrupts, kills and errors at every moment of an export."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import lightprune.export.write
from lightprune.errors import ConfigError, ExportError
from lightprune.export import export_hf
from lightprune.export.target import put_in_place
from tests.export.models import files_in
from tests.families import tiny_lm


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)], ids=["Ctrl-C", "signal"])
def test_an_interrupt_while_it_is_verified(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm(num_layers=2)
    monkeypatch.setattr(lightprune.export.write, "verify_export", raising(error))
    with pytest.raises(type(error)):
        export_hf(lm, tmp_path / "out")
    assert torch.equal(weights_in(tmp_path / "out-unverified")["model.norm.weight"], lm.model.norm.weight)
    assert "interrupted" in (tmp_path / "out-unverified.txt").read_text()


def test_every_failure_is_kept_under_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightprune.export.write, "verify_export", raising(OSError("no space\nleft")))
    for kept in ("out-unverified", "out-unverified-2", "out-unverified-3"):
        with pytest.raises(ExportError, match=f"OSError: no space left; .*kept at '{tmp_path / kept}', with the"):
            export_hf(tiny_lm(num_layers=2), tmp_path / "out", overwrite=True)
    reasons = sorted(path.name for path in tmp_path.glob("*.txt"))
    assert reasons == ["out-unverified-2.txt", "out-unverified-3.txt", "out-unverified.txt"]
    monkeypatch.undo()
    assert export_hf(tiny_lm(num_layers=2), tmp_path / "out").is_dir()
    assert not (tmp_path / "out-unverified-4").exists()


@pytest.mark.parametrize("moment", ["before", "between", "after"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("gone")], ids=["Ctrl-C", "error"])
def test_an_interrupt_while_one_takes_the_place_of_the_other(
    error: BaseException, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tiny_lm(num_layers=2, seed=1), tiny_lm(num_layers=2, seed=2)
    export_hf(old, tmp_path / "out")
    interrupt_renames(monkeypatch, moment, error)
    with pytest.raises((KeyboardInterrupt, ExportError)):
        export_hf(new, tmp_path / "out", overwrite=True)

    norms = {path.name: weights_in(path)["model.norm.weight"] for path in tmp_path.iterdir() if path.is_dir()}
    for lm in (old, new):
        assert any(torch.equal(norm, lm.model.norm.weight) for norm in norms.values())
    assert torch.equal(norms["out"], (new if moment == "after" else old).model.norm.weight)
    assert norms.keys() == {"out", "out-older" if moment == "after" else "out-unverified"}


def interrupt_renames(monkeypatch: pytest.MonkeyPatch, moment: str, error: BaseException) -> None:
    """Let the first rename of an overwriting export fail, or be followed, or the second be followed, by an error."""
    rename, done = Path.rename, []

    def renamed(self: Path, target: Path) -> Path:
        done.append(self)
        if len(done) == 1 and moment == "before":
            raise error
        result = rename(self, target)
        if len(done) == {"before": 0, "between": 1, "after": 2}[moment]:
            raise error
        return result

    monkeypatch.setattr(Path, "rename", renamed)


KILLED = """
import os, signal, sys
from pathlib import Path
from lightprune.export.target import put_in_place

rename = Path.rename

def killed(self, target):
    rename(self, target)
    os.kill(os.getpid(), signal.SIGKILL)

Path.rename = killed
put_in_place(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_kill_between_the_renames(tmp_path: Path) -> None:
    for name in ("out", "out-unverified"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "what").write_text(name)
    arguments = [str(tmp_path / "out-unverified"), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    left = {path.parent.name: path.read_text() for path in tmp_path.rglob("what")}
    assert left == {"out-older": "out", "out-unverified": "out-unverified"}


def test_what_is_older_keeps_the_first_name_that_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("out", "new", "out-older"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("shutil.rmtree", raising(OSError("busy")))
    with pytest.warns(UserWarning, match="earlier export could not be removed, and is now at .*out-older-2"):
        put_in_place(tmp_path / "new", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out-older", "out-older-2"}


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    put_in_place(tmp_path / "new", tmp_path / "out")
    assert not (tmp_path / "out").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "real"}


def test_weights_that_transformers_will_not_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm(num_layers=2)
    monkeypatch.setattr(lm, "save_pretrained", raising(ValueError("never")))
    with pytest.raises(ExportError, match=r"ValueError: never; .*out-unverified"):
        export_hf(lm, tmp_path / "out")
    kept = torch.load(tmp_path / "out-unverified" / "pytorch_model.bin")
    assert {name: tensor.tolist() for name, tensor in lm.state_dict().items()} == {
        n: t.tolist() for n, t in kept.items()
    }
    monkeypatch.undo()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out-unverified")
    assert torch.equal(reloaded.model.norm.weight, lm.model.norm.weight)


def test_a_tokenizer_that_cannot_be_saved(tmp_path: Path) -> None:
    class Unsaveable:
        save_pretrained = raising(TypeError("not me"))

    with pytest.raises(ExportError, match="TypeError: not me"):
        export_hf(tiny_lm(num_layers=2), tmp_path / "out", tokenizer=Unsaveable())  # type: ignore[arg-type]
    assert (tmp_path / "out-unverified" / "model.safetensors").is_file()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    lm = tiny_lm(num_layers=2)
    lm.model.layers[1].mlp.down_proj.weight.data[0, :7] = value
    sentence = r"training has broken the model: 1 of \d+ weights .*layers.1.mlp.down_proj.weight: 7 of 1,536\)"
    with pytest.raises(ExportError, match=sentence):
        export_hf(lm, tmp_path / "out")
    kept = weights_in(tmp_path / "out-unverified")["model.layers.1.mlp.down_proj.weight"]
    assert not kept[0, :7].isfinite().any()


@pytest.mark.parametrize("path", ["s3://bucket/out", "file:///tmp/out", Path("s3://bucket/out")])
def test_a_url(path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="a URL: name a local directory in `path`"):
        export_hf(tiny_lm(num_layers=2), path)
    assert files_in(tmp_path) == {}


def test_the_reloaded_model_shares_the_weights_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the training device holds no second model while logits are compared."""
    lm, seen = tiny_lm(num_layers=2), []
    compare = lightprune.export.verify.logits_apart

    def look(theirs: PreTrainedModel, ours: PreTrainedModel, **kwargs: Any) -> Any:
        pointers = [{p.data_ptr() for p in model.parameters()} for model in (theirs, ours)]
        seen.append(pointers[0] == pointers[1])
        return compare(theirs, ours, **kwargs)

    monkeypatch.setattr(lightprune.export.verify, "logits_apart", look)
    export_hf(lm, tmp_path / "out")
    assert seen == [True]


def test_an_attention_that_runs_on_gpus_alone_is_exchanged_for_the_comparison(tmp_path: Path) -> None:
    """As on rank 0 of a run under ZeRO-3, whose whole weights are on the CPU."""
    lm = tiny_lm(num_layers=2)
    lm.config._attn_implementation = "flash_attention_2"
    path = export_hf(lm, tmp_path / "out")
    assert lm.config._attn_implementation == "flash_attention_2"
    assert AutoModelForCausalLM.from_pretrained(path).config._attn_implementation == "sdpa"


def test_a_device_without_memory_for_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is verified on the CPU, and is on its device afterwards."""
    lm, tried = tiny_lm(num_layers=2), []
    monkeypatch.setattr(type(lm), "device", property(lambda self: torch.device("cuda", 0)))

    def verify(path: Path, lm: PreTrainedModel, out: Any) -> None:
        tried.append({parameter.device.type for parameter in lm.parameters()})
        if len(tried) == 1:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(lightprune.export.write, "verify_export", verify)
    before = [tensor.data_ptr() for tensor in (*lm.parameters(), *lm.buffers())]
    assert export_hf(lm, tmp_path / "out").is_dir()
    assert len(tried) == 2
    assert [tensor.data_ptr() for tensor in (*lm.parameters(), *lm.buffers())] == before
