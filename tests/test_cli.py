"""The command line, end to end, on a tiny model, a tiny tokenizer and a text file of the user's own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightprune import ConfigError
from lightprune.anatomy import anatomy_of
from lightprune.callbacks.progress import PruningProgressBar
from lightprune.callbacks.random_state import RandomState
from lightprune.callbacks.run_report import RunReport
from lightprune.cli import default_callbacks, main
from lightprune.costs import Workload, costs_of
from lightprune.data import DomainCounts
from lightprune.errors import ExportError
from lightprune.plan import PruningPlan
from tests.training import byte_tokenizer

LAYERS, DROP, CUT, STEPS = 4, 2, 2, 4
SHIPPED = Path(__file__).parents[1] / "configs" / "methods"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `model` (a random Llama and a byte-level tokenizer) and `text.txt`."""
    root = tmp_path_factory.mktemp("inputs")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(root / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(root / "model")
    (root / "text.txt").write_text("All the world is a stage, and the men and women merely players. " * 60)
    return root


@pytest.fixture
def configs(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three composed configs, as a user has them: the method, the model, the data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightprune"])
    parts: dict[str, Any] = {
        "method": {
            "trainer": {
                "accelerator": "cpu",
                "max_steps": STEPS,
                "default_root_dir": str(tmp_path / "run"),
                "enable_model_summary": False,
                "callbacks": [
                    {"class_path": "lightprune.RandomSelector", "init_args": {"drop": DROP, "protect_first": 1}},
                    {"class_path": "lightprune.GateAnnealing"},
                    {"class_path": "lightprune.StructuredCut", "init_args": {"at": CUT}},
                ],
            }
        },
        "model": {"model": {"class_path": "lightprune.module.CausalLM", "init_args": {"model": str(inputs / "model")}}},
        "data": {
            "data": {
                "class_path": "lightprune.data.TextDataModule",
                "init_args": {
                    "domains": {"plays": {"files": str(inputs / "text.txt")}},
                    "block_size": 16,
                    "batch_size": 2,
                    "num_workers": 0,
                    "cache_dir": str(tmp_path / "cache"),
                },
            }
        },
    }
    for name, content in parts.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return [argument for name in parts for argument in ("--config", f"{name}.yaml")]


@pytest.fixture
def checkpoint(configs: list[str], tmp_path: Path) -> Path:
    """The checkpoint that a run over the cut leaves."""
    assert main(["fit", *configs]) == 0
    return next((tmp_path / "run").rglob(f"*step={STEPS}*.ckpt"))


def test_fit_validate_export(
    configs: list[str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["before"]["layers"], summary["after"]["layers"]) == (LAYERS, LAYERS - DROP)
    assert list(summary["metrics"]) == ["start", "before_cut", "after_cut", "end"]
    assert "val/ppl/plays" in summary["metrics"]["end"]

    assert main(["validate", *configs, "--ckpt_path", str(checkpoint)]) == 0
    assert f"{summary['metrics']['end']['val/ppl']:.3f}"[:6] in capsys.readouterr().out

    assert main(["export", *configs, "--ckpt_path", str(checkpoint), "--output", "exported"]) == 0
    exported = AutoModelForCausalLM.from_pretrained("exported")
    assert exported.config.num_hidden_layers == LAYERS - DROP
    assert sum(p.numel() for p in exported.parameters()) == summary["after"]["parameters"]
    trained = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, weight in exported.state_dict().items():
        torch.testing.assert_close(weight, trained[f"lm.{name}"], rtol=0, atol=0)
    prompt = AutoTokenizer.from_pretrained("exported")("All the world", return_tensors="pt")
    assert exported.generate(**prompt, max_new_tokens=3, min_new_tokens=3).shape[1] == prompt["input_ids"].shape[1] + 3


def test_export_overwrites_only_when_asked(
    configs: list[str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", *configs, "--ckpt_path", str(checkpoint), "--output", "exported"]
    assert main(arguments) == 0
    written = (tmp_path / "exported" / "model.safetensors").stat().st_mtime_ns
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "exported" / "model.safetensors").stat().st_mtime_ns == written
    assert main([*arguments, "--overwrite"]) == 0
    assert (tmp_path / "exported" / "model.safetensors").stat().st_mtime_ns != written


def test_export_takes_the_tokenizer_that_is_named(
    configs: list[str], checkpoint: Path, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", *configs, "--ckpt_path", str(checkpoint), "--output", "exported"]
    assert main([*arguments, "--tokenizer", "nowhere/at/all"]) == 2
    assert "There is no file or directory 'nowhere/at/all'" in capsys.readouterr().err
    assert not Path("exported").exists()
    named = AutoTokenizer.from_pretrained(inputs / "model")
    named.model_max_length = 77
    named.save_pretrained("tokenizer")
    assert main([*arguments, "--tokenizer", "tokenizer"]) == 0
    assert AutoTokenizer.from_pretrained("exported").model_max_length == 77


@pytest.mark.parametrize("url", ["s3://bucket/exported", "file:///tmp/exported"])
def test_urls_are_no_place_for_an_export(url: str, configs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    export = {"class_path": "lightprune.ExportHF", "init_args": {"path": url}}
    Path("export.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [export]}}))
    torch.save({}, "none.ckpt")
    assert main(["export", *configs, "--ckpt_path=none.ckpt", "--output", url]) == 2
    assert f"The output is '{url}', a URL: name a local directory in `output`" in capsys.readouterr().err
    assert main(["fit", *configs, "--config", "export.yaml"]) == 2
    assert f"The output is '{url}', a URL: name a local directory in `path`" in capsys.readouterr().err
    assert [path.name for path in Path().rglob("*.ckpt")] == ["none.ckpt"]


def test_a_run_whose_export_fails_keeps_all_and_says_so(
    configs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def differs(*args: Any) -> None:
        raise ExportError("the reloaded model differs: everything")

    monkeypatch.setattr("lightprune.export.write.verify_export", differs)
    export = {"class_path": "lightprune.ExportHF", "init_args": {"path": "pruned"}}
    Path("export.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [export]}}))
    assert main(["fit", *configs, "--config", "export.yaml"]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("The model was not exported to 'pruned': the reloaded model differs: everything; ")
    assert Path("pruned-unverified.txt").is_file()
    layers = AutoModelForCausalLM.from_pretrained("pruned-unverified").config.num_hidden_layers
    assert layers == LAYERS - DROP
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["after"]["layers"] == layers
    assert any((tmp_path / "run").rglob(f"*step={STEPS}*.ckpt"))


def test_export_refuses_an_uncut_checkpoint(
    configs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saver = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 1, "save_top_k": -1}}
    (tmp_path / "saver.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [saver]}}))
    assert main(["fit", *configs, "--config", "saver.yaml"]) == 0
    early = next((tmp_path / "run").rglob("*step=1.ckpt"))
    assert main(["export", *configs, "--ckpt_path", str(early), "--output", "exported"]) == 2
    assert "uncut" in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()


def test_an_argument_of_a_callback_from_the_command_line(configs: list[str], tmp_path: Path) -> None:
    """It acts, and config.yaml says so: a run from that file is the same."""
    assert main(["fit", "--callback.RandomSelector.drop", "1", *configs, "--callback.StructuredCut.at=3"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["after"]["layers"], summary["cut_steps"]) == (LAYERS - 1, [3])
    saved = yaml.safe_load(next((tmp_path / "run").rglob("config.yaml")).read_text())
    selector, _, cut = saved["trainer"]["callbacks"]
    assert (selector["init_args"]["drop"], cut["init_args"]["at"]) == (1, 3)


def test_classes_of_lightprune_need_no_module(configs: list[str], tmp_path: Path) -> None:
    """In a process that has imported none of them yet; the parser knows only what is imported."""
    for name in ("method", "model", "data"):
        text = (tmp_path / f"{name}.yaml").read_text()
        (tmp_path / f"{name}.yaml").write_text(re.sub(r"class_path: lightprune\.(\w+\.)?", "class_path: ", text))
    command = [sys.executable, "-m", "lightprune", "plan", *configs]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "Layers that go: " in finished.stdout


def test_plan_of_layers_known_beforehand(configs: list[str], inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *configs]) == 0
    out = capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    before = sum(p.numel() for p in model.parameters())
    assert f"{before:,}" in out
    assert f"{before - DROP * layer:,}" in out
    assert "num_hidden_layers" in out
    assert "Layers that go: " in out
    assert not Path("run").exists()


def test_plan_tells_the_costs(configs: list[str], inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that is printed comes from the document, and the document is that of `costs_of`."""
    arguments = ["--prompt=32", "--context=64", "--batch_size=2", "--dtype=bfloat16", "--output=plan.json"]
    assert main(["plan", *configs, *arguments]) == 0
    document = json.loads(Path("plan.json").read_text())
    assert document["workload"] == {"prompt": 32, "context": 64, "batch": 2, "dtype": "bfloat16"}
    anatomy = anatomy_of(AutoModelForCausalLM.from_pretrained(inputs / "model"))
    kept = [index for index in range(anatomy.num_layers) if index not in document["layers"]]
    work = Workload(prompt=32, context=64, batch=2, dtype=torch.bfloat16)
    plans = {"before": PruningPlan.of(anatomy), "after": PruningPlan.of(anatomy, layers=kept)}
    costs = {when: costs_of(anatomy, plan, work) for when, plan in plans.items()}
    assert document["costs"] == {when: of_model.as_dict() for when, of_model in costs.items()}
    assert document["speedup"]["prefill"] == costs["before"].prefill / costs["after"].prefill
    assert document["elsewhere"] == []
    out = capsys.readouterr().out
    assert f"{document['speedup']['decode']:.2f}" in out
    assert "KV cache of 2 x 64 tokens" in out
    assert main(["plan", *configs, "--context=0"]) == 2
    assert "plan.context is 0" in capsys.readouterr().err


def test_plan_of_a_target(configs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    target = {
        "class_path": "lightprune.RandomUnitSelector",
        "init_args": {"target": {"parameters": 0.9}, "multiple_of": 1},
    }
    cut = {"class_path": "lightprune.StructuredCut", "init_args": {"at": 3}}
    Path("method2.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [target, cut]}}))
    assert main(["plan", *configs, "--config", "method2.yaml", "--output=plan.json"]) == 0
    costs = json.loads(Path("plan.json").read_text())["costs"]
    assert 0.85 < costs["after"]["parameters"] / costs["before"]["parameters"] <= 0.9
    assert main(["plan", *configs, "--config", "method2.yaml", "--callback.RandomUnitSelector.target.flops=0.5"]) == 2
    assert "target sets parameters, flops: set exactly one" in capsys.readouterr().err


def test_plan_of_layers_to_be_learned(configs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    selector = {"class_path": "lightprune.BlockInfluenceSelector", "init_args": {"drop": 1, "stop": 2}}
    cut = {"class_path": "lightprune.StructuredCut", "init_args": {"at": 3}}
    Path("method2.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [selector, cut]}}))
    assert main(["plan", *configs, "--config", "method2.yaml"]) == 0
    assert "BlockInfluenceSelector decides about layers at step 2" in capsys.readouterr().out


def test_plan_tells_when_the_domains_are_reweighted(configs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    reweighting = {"class_path": "lightprune.DomainReweighting", "init_args": {"start": 1}}
    assert main(["plan", *configs, f"--trainer.callbacks+={json.dumps(reweighting)}"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "DomainReweighting" in line]
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == ["DomainReweighting", "1", "end"]


def test_plan_runs_where_the_config_trains_elsewhere(configs: list[str]) -> None:
    assert main(["plan", *configs, "--trainer.accelerator=cuda", "--trainer.devices=8"]) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["fit", "--trainer.max_steps=1"], "trainer.max_steps is 1"),
        (["plan", "--trainer.max_steps=1"], "trainer.max_steps is 1"),
        (["plan", "--trainer.callbacks=[]"], "Nothing is to be cut"),
        (["fit", "--model.init_args.model=./nowhere"], "'./nowhere'"),
        (["fit", "--data.init_args.block_size=1"], "data.block_size is 1"),
        (["export", "--ckpt_path=none.ckpt", "--output=exported"], "There is no checkpoint at 'none.ckpt'"),
        (["fit", "--ckpt_path=none.ckpt"], "There is no checkpoint at 'none.ckpt'"),
        (["fit", "--ckpt_path=method.yaml"], "'method.yaml' is no checkpoint"),
        (["export", "--ckpt_path=method.yaml", "--output=exported"], "'method.yaml' is no checkpoint"),
        (["fit", "--trainer.limit_train_batches=-3"], "limit_train_batches"),
        (["fit", "--trainer.strategy=abacus"], "invalid strategy name: `strategy='abacus'`"),
        (["fit", "--trainer.callbacks+=lightprune.GateAnnealing"], "more than one stateful callback"),
        (["fit", "--config=none.yaml"], "none.yaml"),
        (["fit", "--trainer.max_stepz=1"], "max_stepz"),
    ],
)
def test_mistakes_are_one_sentence(
    configs: list[str], arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    verb, *rest = arguments
    assert main([verb, *configs, *rest]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence in last
    assert "Traceback" not in last
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not (tmp_path / "run" / "summary.json").exists()
    assert set(before) <= {path.name for path in tmp_path.iterdir()}


class Interruption(RuntimeError):
    """What `Interrupt` raises."""


class Interrupt(Callback):
    """Ends a run as the batch begins that follows so many optimizer steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise Interruption


def shipped_checkpoints() -> dict[str, Any]:
    """The `ModelCheckpoint` of the shipped methods: the same in each but for its directory."""
    found = []
    for path in SHIPPED.glob("*.yaml"):
        callbacks = yaml.safe_load(path.read_text())["trainer"]["callbacks"]
        (saver,) = [callback for callback in callbacks if callback["class_path"].endswith(".ModelCheckpoint")]
        assert saver["init_args"].pop("dirpath") == f"out/{path.stem}/checkpoints"
        found.append(saver)
    assert all(saver == found[0] for saver in found)
    return found[0]


def test_resumes_from_the_checkpoints_that_the_shipped_configs_keep(configs: list[str], tmp_path: Path) -> None:
    """Interrupted before the first checkpoint, after the cut and near the end: the same as undisturbed, bit by bit."""
    saver = shipped_checkpoints()
    saver["init_args"]["every_n_train_steps"] = 2

    def run(folder: str, interrupt: int | None = None) -> Path:
        saver["init_args"]["dirpath"] = folder
        interrupts = [{"class_path": "tests.test_cli.Interrupt", "init_args": {"step": interrupt}}]
        callbacks = [saver, *(interrupts if interrupt is not None else [])]
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"trainer": {"max_steps": 6, "callbacks+": callbacks}}))
        assert main(["fit", *configs, "--config", "run.yaml", "--ckpt_path", "last"]) == 0
        return Path(folder, "last.ckpt")

    expected = torch.load(run("undisturbed"), weights_only=True)
    for step in (1, 3, 5):
        with pytest.raises(Interruption):
            run("disturbed", interrupt=step)
    found = torch.load(run("disturbed"), weights_only=True)

    assert found["global_step"] == expected["global_step"] == 6
    assert [path.name for path in Path("disturbed").iterdir()] == ["last.ckpt"]
    for key in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0)

    assert main(["export", *configs, "--config", "run.yaml", "--ckpt_path=last", "--output=exported"]) == 0
    lm = AutoModelForCausalLM.from_pretrained("exported")
    saved = found["state_dict"]
    assert all(torch.equal(weight, saved[f"lm.{name}"]) for name, weight in lm.state_dict().items())


def test_exit_status_of_the_process(configs: list[str]) -> None:
    """Through the real entry point: status 2, the sentence last, no traceback."""
    command = [sys.executable, "-m", "lightprune", "fit", *configs, "--trainer.max_steps=1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert finished.returncode == 2
    assert finished.stderr.strip().splitlines()[-1].startswith("trainer.max_steps is 1")
    assert "Traceback" not in finished.stderr


def test_debug_shows_the_traceback(configs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTPRUNE_DEBUG", "1")
    with pytest.raises(ConfigError, match="max_steps is 1"):
        main(["fit", *configs, "--trainer.max_steps=1"])


def test_other_errors_keep_their_traceback(configs: list[str]) -> None:
    interrupt = {"class_path": "tests.test_cli.Interrupt", "init_args": {"step": 1}}
    with pytest.raises(Interruption):
        main(["fit", *configs, f"--trainer.callbacks+={json.dumps(interrupt)}"])


def test_default_callbacks_give_way_to_the_users() -> None:
    def defaults(*given: Callback, progress_bar: bool = True) -> list[type[Callback]]:
        return [type(callback) for callback in default_callbacks(given, progress_bar=progress_bar)]

    assert defaults() == [PruningProgressBar, RunReport, RandomState, DomainCounts]
    assert defaults(progress_bar=False) == [RunReport, RandomState, DomainCounts]
    assert defaults(TQDMProgressBar()) == [RunReport, RandomState, DomainCounts]
    assert defaults(RunReport(validate_at_start=False)) == [PruningProgressBar, RandomState, DomainCounts]
    assert defaults(RandomState(seed=3)) == [PruningProgressBar, RunReport, DomainCounts]
