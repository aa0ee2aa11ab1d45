"""`trainer.precision: auto`: what the command line makes of it, keeps of it and says about it."""

import json
import os
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lightprune.cli import main, native
from lightprune.cli.precision import choose_precision
from tests.training import Plain, batches

BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
CPU = torch.device("cpu")
STEPS = 2
# What masks the units of a CPU that has them.
MASK = ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No mask that comes from outside, and a process of no argument's."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightprune"])


@pytest.fixture
def native_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with AMX, whatever this machine has: what it computes is the same, only slower."""
    monkeypatch.setattr(native, "_cpu_features", lambda: {"avx512_bf16", "amx_bf16"})


@pytest.mark.parametrize(
    ("features", "dtype", "expected"),
    [
        ({"avx512_bf16"}, BFLOAT16, True),
        ({"amx_bf16"}, BFLOAT16, True),
        ({"bf16"}, BFLOAT16, True),
        ({"avx512_f", "avx2"}, BFLOAT16, False),
        ({"avx512_bf16", "amx_bf16"}, FLOAT16, False),
        ({"avx512_fp16"}, FLOAT16, True),
        (None, BFLOAT16, None),
    ],
)
def test_what_a_cpu_needs(
    features: set[str] | None, dtype: torch.dtype, expected: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_cpu_features", lambda: features)
    assert native.native_support([CPU], dtype).native is expected


@pytest.mark.parametrize(
    ("name", "value", "masked"),
    [
        (*MASK, True),
        ("ONEDNN_MAX_CPU_ISA", "avx2", True),
        ("DNNL_MAX_CPU_ISA", "AVX512_CORE_VNNI", True),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", False),
        ("ONEDNN_MAX_CPU_ISA", "ALL", False),
        ("ATEN_CPU_CAPABILITY", "avx2", True),
        ("ATEN_CPU_CAPABILITY", "avx512", False),
    ],
)
@pytest.mark.usefixtures("native_cpu")
def test_masks_of_the_environment(name: str, value: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    support = native.native_support([CPU], BFLOAT16)
    assert support.native is not masked
    assert (f"{name}={value}" in support.reason) is masked


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64", reason="reads Linux's flags")
def test_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as the kernel's own list says, also by the functions of older versions of PyTorch."""
    (flags, *_) = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")]
    expected = {"avx512_bf16", "amx_bf16"} & set(flags.split())
    of_bfloat16 = {"avx512_bf16", "amx_bf16"}
    found = native._cpu_features()
    assert found is not None
    assert found & of_bfloat16 == expected
    older = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    monkeypatch.setattr(torch, "cpu", SimpleNamespace(**{name: getattr(torch.cpu, name) for name in older}))
    assert native._cpu_features() == expected
    monkeypatch.setattr(torch, "cpu", SimpleNamespace())
    assert native._cpu_features() is None


@pytest.mark.parametrize(
    ("capabilities", "dtype", "expected"),
    [
        ([(8, 0), (9, 0)], BFLOAT16, True),
        ([(9, 0), (7, 5)], BFLOAT16, False),
        ([(7, 5)], FLOAT16, True),
    ],
)
def test_every_cuda_device_counts(
    capabilities: list[tuple[int, int]], dtype: torch.dtype, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    devices = [torch.device("cuda", index) for index in range(len(capabilities))]
    support = native.native_support(devices, dtype)
    assert support.native is expected
    if not expected:
        assert "GPU 1" in support.reason
        assert "7.5" in support.reason


def test_nothing_is_claimed_of_other_devices() -> None:
    assert native.native_support([torch.device("mps")], BFLOAT16).native is None
    assert native.native_support([], BFLOAT16).native is None


class RandomTokens(pl.LightningDataModule):
    """Batches for a tiny model."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(batches(2 * STEPS), batch_size=None)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(batches(1), batch_size=None)


def arguments(**trainer: Any) -> list[str]:
    """The config of a run that saves `checkpoints/last.ckpt` after each step, for all verbs."""
    saver = {
        "class_path": "ModelCheckpoint",
        "init_args": {"dirpath": "checkpoints", "every_n_train_steps": 1, "save_last": True},
    }
    config = {
        "trainer": {
            "accelerator": "cpu",
            "precision": "auto",
            "max_steps": STEPS,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "callbacks": [
                {"class_path": "lightprune.RandomSelector", "init_args": {"drop": 1}},
                {"class_path": "lightprune.StructuredCut", "init_args": {"at": 1}},
                saver,
            ],
            **trainer,
        },
        "model": {"class_path": f"{Plain.__module__}.Plain"},
        "data": {"class_path": f"{__name__}.RandomTokens"},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    return ["--config", "run.yaml"]


def summary() -> dict[str, str]:
    found: dict[str, str] = json.loads(Path("summary.json").read_text())["precision"]
    return found


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("Precision")]


@pytest.mark.parametrize(("masked", "used", "why"), [(False, "bf16-mixed", "AMX-BF16"), (True, "32-true", MASK[0])])
@pytest.mark.usefixtures("native_cpu")
def test_a_new_run(
    masked: bool, used: str, why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if masked:
        monkeypatch.setenv(*MASK)
    assert main(["fit", *arguments()]) == 0
    (line,) = lines(capsys)
    assert line.startswith(f"Precision {used}: ")
    assert why in line
    assert summary()["used"] == used
    assert summary()["reason"] in line
    saved = torch.load("checkpoints/last.ckpt", weights_only=True)["callbacks"]["RunReport"]["precision"]
    assert saved == summary()
    # The config goes on saying what was asked for.
    assert yaml.safe_load(Path("config.yaml").read_text())["trainer"]["precision"] == "auto"


@pytest.mark.parametrize("verb", ["fit", "validate"])
@pytest.mark.parametrize("ckpt_path", ["last", "checkpoints/last.ckpt"])
@pytest.mark.parametrize("began_masked", [False, True])
@pytest.mark.usefixtures("native_cpu")
def test_a_resumed_run_keeps_its_precision(
    verb: str,
    ckpt_path: str,
    began_masked: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if began_masked:
        monkeypatch.setenv(*MASK)
    assert main(["fit", *arguments()]) == 0
    kept = summary()["used"]
    if began_masked:
        monkeypatch.delenv(MASK[0])
    else:
        monkeypatch.setenv(*MASK)
    capsys.readouterr()
    assert main([verb, *arguments(max_steps=2 * STEPS), "--ckpt_path", ckpt_path]) == 0
    (line,) = lines(capsys)
    other = {"bf16-mixed": "32-true", "32-true": "bf16-mixed"}[kept]
    assert line.startswith(f"Precision {kept}: the run that wrote ")
    assert f"a new run would get {other} here" in line
    assert ("3.7 times" in line) is (kept == "bf16-mixed")
    if verb == "fit":
        assert summary()["used"] == kept
        assert "the run that wrote" in summary()["reason"]


@pytest.mark.usefixtures("native_cpu")
def test_a_run_that_finds_no_last_checkpoint_is_new(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *arguments(), "--ckpt_path", "last"]) == 0
    assert lines(capsys)[0].startswith("Precision bf16-mixed: this CPU")


def settings(**changed: Any) -> dict[str, Any]:
    """What `choose_precision` asks of a trainer's arguments."""
    usual = {"precision": "auto", "accelerator": "cpu", "devices": 1, "strategy": "auto", "plugins": None}
    return {**usual, "logger": False, "default_root_dir": None, **changed}


@pytest.mark.usefixtures("native_cpu")
def test_deepspeed_directories_tell(tmp_path: Path) -> None:
    folder = tmp_path / "step=1.ckpt" / "checkpoint"
    folder.mkdir(parents=True)
    states = {"module": {}, "callbacks": {"RunReport": {"precision": {"used": "32-true", "reason": None}}}}
    torch.save(states, folder / "mp_rank_00_model_states.pt")
    choice = choose_precision(settings(), [], str(folder.parent))
    assert choice is not None
    assert choice.used == "32-true"


class Dangerous:
    """Leaves a file behind where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize(
    "content", [{"callbacks": {}, "of a stranger": Dangerous()}, {"callbacks": {"RunReport": {"tokens": {}}}}, {}]
)
@pytest.mark.usefixtures("native_cpu")
def test_checkpoints_that_do_not_tell(content: dict[str, Any]) -> None:
    """Of an older version, of another trainer; and nothing is unpickled to find out."""
    torch.save(content, "some.ckpt")
    choice = choose_precision(settings(), [], "some.ckpt")
    assert choice is not None
    assert choice.used == "bf16-mixed"
    assert not Path("unpickled").exists()


@pytest.mark.parametrize(
    ("stated", "masked", "warns"),
    [
        ("bf16-mixed", True, True),
        ("bf16-true", True, True),
        ("16-true", False, True),  # AMX has no float16 here
        ("bf16-mixed", False, False),
        ("32-true", True, False),
        (None, True, False),
    ],
)
@pytest.mark.usefixtures("native_cpu")
def test_a_stated_precision_is_obeyed(
    stated: str | None,
    masked: bool,
    warns: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    if masked:
        monkeypatch.setenv(*MASK)
    assert main(["fit", *arguments(precision=stated)]) == 0
    assert lines(capsys) == []
    assert summary()["used"] == (stated or "32-true")
    said = [str(warning.message) for warning in recwarn if "emulated" in str(warning.message)]
    assert len(said) == warns
    if warns:
        assert f"trainer.precision is {stated}" in said[0]
        assert "3.7 times" in said[0]


def test_a_plugin_decides() -> None:
    plugin = MixedPrecision("bf16-mixed", "cpu")
    assert choose_precision(settings(plugins=plugin), [], None) is None
    assert choose_precision(settings(plugins=[plugin]), [], None) is None
    assert choose_precision(settings(strategy=DDPStrategy(precision_plugin=plugin)), [], None) is None


@pytest.mark.usefixtures("native_cpu")
def test_devices_of_a_strategy_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    strategy = DDPStrategy(parallel_devices=[torch.device("cuda", 0)])
    choice = choose_precision(settings(accelerator="auto", strategy=strategy), [], None)
    assert choice is not None
    assert choice.used == "32-true"


def test_verbs_that_train_nothing_do_not_choose(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments()]) == 0
    assert lines(capsys) == []
    with pytest.raises(SystemExit):
        main(["fit", *arguments(), "--print_config"])
    assert "precision: auto" in capsys.readouterr().out


def test_mistakes_stay_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    for mistake in ("--trainer.precision=half", "--trainer.devices=0", "--trainer.accelerator=abacus"):
        assert main(["fit", *arguments(), mistake]) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_a_trainer_in_python_is_lightnings_own() -> None:
    with pytest.raises(ValueError, match="Precision 'auto' is invalid"):
        pl.Trainer(accelerator="cpu", precision="auto", logger=False)  # type: ignore[arg-type]
