"""The built distributions: what they hold, and that an installed wheel works far from any clone."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightprune import ConfigError, __version__
from lightprune.cli import main, shipped

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel and the source distribution of this tree."""
    directory = tmp_path_factory.mktemp("dist")
    for kind in ("wheel", "sdist"):
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(directory)], cwd=ROOT, check=True
        )
    return directory


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an environment with the wheel in it; what lightprune requires, it takes from the running one."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False)
    commands = place / ("Scripts" if sys.platform == "win32" else "bin")
    (site,) = place.rglob("site-packages")
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(commands / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    # A directory on the path, whose own .pth files are not read: this tree's editable install stays out.
    (site / "required.pth").write_text(sysconfig.get_path("purelib"))
    return commands


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_configs_and_the_launch_scripts(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for folder in shipped.FOLDERS:
        for file in (ROOT / folder).rglob("*.*"):
            assert f"lightprune/shipped/{file.relative_to(ROOT).as_posix()}" in held
    assert {
        f"lightprune/{file.relative_to(ROOT / 'lightprune')}" for file in (ROOT / "lightprune").rglob("*.py")
    } <= held
    assert wheel.name.startswith(f"lightprune-{__version__}-")


def test_the_source_distribution_holds_the_tree(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    known = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    wanted = {
        "lightprune/cli/shipped.py",
        "configs/quickstart.yaml",
        "launch/fit.sbatch",
        "docs/design.md",
        "Makefile",
        "constraints.txt",
        "examples/write.py",
        "CHANGELOG.md",
    }
    if known.returncode == 0:
        wanted |= {file for file in known.stdout.split() if file.startswith(("lightprune/", "configs/", "tests/"))}
    assert wanted <= held


def test_an_installed_wheel_prunes_a_model_elsewhere(installed: Path, tmp_path: Path) -> None:
    vocabulary = {symbol: index for index, symbol in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=12,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("All the world is a stage, and the men and women merely players. " * 60)
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump(
            {
                "data": {
                    "class_path": "lightprune.data.TextDataModule",
                    "init_args": {
                        "domains": {"plays": {"files": "text.txt"}},
                        "block_size": 16,
                        "batch_size": 2,
                        "cache_dir": "cache",
                    },
                },
            }
        )
    )
    assert run(installed / "lightprune", "--version", cwd=tmp_path) == f"lightprune {__version__}\n"
    where = run(installed / "python", "-c", "import lightprune; print(lightprune.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    options = {"trainer.max_steps": 8, "trainer.accelerator": "cpu", "trainer.precision": "32-true"}
    options["model.init_args.model"] = "model"
    run(
        installed / "lightprune",
        "fit",
        *("--config", "methods/shortgpt.yaml", "--config", "models/hub.yaml", "--config", "mine.yaml"),
        *(part for key, value in options.items() for part in (f"--{key}", str(value))),
        cwd=tmp_path,
    )
    (exported,) = {file.parent for file in tmp_path.rglob("pruning_plan.json")}
    assert AutoModelForCausalLM.from_pretrained(exported).config.num_hidden_layers < 12


def test_shipped_configs_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    there = str(ROOT / "configs" / "methods" / "trsp.yaml")
    given = ["fit", "--config", "methods/trsp.yaml", "--config=configs/methods/trsp.yaml", "-c", "own.yaml"]
    assert shipped.resolve(given) == ["fit", "--config", there, f"--config={there}", "-c", "own.yaml"]
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "trsp.yaml").write_text("trainer: {}")
    assert shipped.resolve(given)[2] == "methods/trsp.yaml"  # a local file comes first


def test_configs_lists_prints_and_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == shipped.names()
    assert all(len(line.split()) > 3 for line in listed)
    assert main(["configs", "methods/trsp.yaml"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs" / "methods" / "trsp.yaml").read_text()
    assert main(["configs", "--copy", str(tmp_path)]) == 0
    copied = {file.relative_to(tmp_path) for file in tmp_path.rglob("*.*")}
    assert copied == {f.relative_to(ROOT) for name in shipped.FOLDERS for f in (ROOT / name).rglob("*.*")}


@pytest.mark.parametrize(
    ("arguments", "said"),
    {
        "a name that is none": (["methods/tsrp.yaml"], "did you mean 'methods/trsp.yaml'"),
        "a folder that is there": (["--copy", str(ROOT)], "is there already"),
        "an option that is none": (["--list"], "takes the name of one config"),
    }.values(),
)
def test_mistakes_with_shipped_configs(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        shipped.answer(arguments)
