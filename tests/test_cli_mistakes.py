"""Mistakes of a user's in commands, options and configs: each is one sentence and status 2. Nothing is trained here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightprune.cli import main
from lightprune.cli.early import answer
from lightprune.cli.mistakes import explain

Config = dict[str, Any]


def config() -> Config:
    """A config without a mistake; its model is never loaded."""
    return {
        "trainer": {
            "max_steps": 8,
            "callbacks": [
                {"class_path": "lightprune.LayerGateSelector", "init_args": {"drop": 2, "steps_per_round": 1}},
                {"class_path": "lightprune.StructuredCut", "init_args": {"at": 6}},
            ],
        },
        "model": {"class_path": "lightprune.CausalLM", "init_args": {"model": "./none"}},
        "data": {
            "class_path": "lightprune.data.TextDataModule",
            "init_args": {"domains": {"plays": {"files": "plays.txt"}}, "block_size": 16},
        },
    }


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistake is answered with."""
    assert main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("Seed set to")]
    assert "Parser key" not in line
    assert "<class" not in line
    return line


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda c: c.update(optimiser={"lr": 1}),
            "The config of fit has no setting 'optimiser': it may have seed_everything,",
        ),
        (lambda c: c["trainer"].update(max_step=3), "trainer has no setting 'max_step' (did you mean 'max_steps'?)"),
        (lambda c: c["trainer"].update(max_steps="lots"), "trainer.max_steps is 'lots': it must be a whole number."),
        (lambda c: c["trainer"].update(precision=12), "trainer.precision is '12': it must be auto, 64, 32, 16, "),
        (lambda c: c["trainer"].update(accelerator="cpu", devices="two"), "`devices` selected with `CPUAccelerator`"),
        (lambda c: c["trainer"].update(callbacks="None"), "trainer.callbacks: there is no class 'None'"),
        (
            lambda c: c["trainer"]["callbacks"][0].update(class_path="lightprune.LayerGatesSelector"),
            "trainer.callbacks: lightprune has no class 'LayerGatesSelector' (did you mean 'LayerGateSelector'?)",
        ),
        (
            lambda c: c["trainer"]["callbacks"][0].update(class_path="lightprun.LayerGateSelector"),
            "trainer.callbacks: there is no module 'lightprun', which class_path names",
        ),
        (
            lambda c: c["trainer"]["callbacks"][0].update(class_path="LayerGatesSelector"),
            "trainer.callbacks: there is no class 'LayerGatesSelector' (did you mean 'LayerGateSelector'?)",
        ),
        (
            lambda c: c["trainer"]["callbacks"][0].update(class_path="lightprune.CausalLM"),
            "trainer.callbacks: lightprune.CausalLM is not a Callback",
        ),
        (
            lambda c: c["trainer"]["callbacks"][0]["init_args"].update(steps_per_rounds=1),
            "trainer.callbacks: lightprune.LayerGateSelector has no argument 'steps_per_rounds' (did you mean "
            "'steps_per_round'?): it takes drop, rounds, steps_per_round, ",
        ),
        (
            lambda c: c["trainer"]["callbacks"][0]["init_args"].update(drop="many"),
            "LayerGateSelector.drop is 'many': it must be a whole number.",
        ),
        (
            lambda c: c["trainer"]["callbacks"][0]["init_args"].update(placement="up"),
            "LayerGateSelector.placement is 'up': it must be residual,",
        ),
        (lambda c: c["trainer"]["callbacks"][0]["init_args"].pop("drop"), "lightprune.LayerGateSelector needs drop"),
        (
            lambda c: c["trainer"]["callbacks"].append({"GateAnnealing": None}),
            "trainer.callbacks names no class for 'GateAnnealing': give class_path",
        ),
        (lambda c: c.pop("model"), "fit needs model: set it in a config file (--config), or by --model."),
        (lambda c: c["model"].update(class_path="lightprune.CausalLLM"), "lightprune has no class 'CausalLLM'"),
        (lambda c: c["model"]["init_args"].update(modle="x"), "lightprune.CausalLM has no argument 'modle'"),
        (
            lambda c: c["model"]["init_args"].update(
                optimizer={"class_path": "torch.optim.Adam", "init_args": {"rate": 1}}
            ),
            "CausalLM.optimizer: torch.optim.Adam has no argument 'rate': it takes ",
        ),
        (
            lambda c: c["model"]["init_args"].update(optimizer={"class_path": "torch.optim.Adamm"}),
            "CausalLM.optimizer: torch.optim has no class 'Adamm' (did you mean 'Adam'?)",
        ),
        (
            lambda c: c["data"]["init_args"].update(blocksize=1),
            "has no argument 'blocksize' (did you mean 'block_size'?)",
        ),
        (lambda c: c["data"]["init_args"].update(block_size="big"), "TextDataModule.block_size is 'big'"),
        (
            lambda c: c["data"]["init_args"]["domains"]["plays"].update(fils="x"),
            "TextDataModule.domains: lightprune.data.Source has no argument 'fils' (did you mean 'files'?)",
        ),
        (lambda c: c["data"]["init_args"].update(domains="plays"), "TextDataModule.domains is 'plays'"),
        (lambda c: c["data"].pop("class_path"), "data names no class for 'domains"),
    ],
)
def test_in_a_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Config], object], sentence: str
) -> None:
    settings = config()
    change(settings)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert sentence in said(capsys, "fit", "--config", str(tmp_path / "config.yaml"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            [],
            "a command: one of fit, validate, test, plan, export, generate, benchmark, configs (see lightprune",
        ),
        (["fitt"], "'fitt' is not a command of lightprune (did you mean 'fit'?)"),
        (["fit", "plan"], "lightprune runs one command at a time: give 'fit' or 'plan', not both."),
        (["fit", "--config"], "--config needs the path of a YAML file."),
        (
            ["fit", "--config", "none.yaml"],
            "The config file 'none.yaml' does not exist, and no config of that name comes with "
            "lightprune: correct it; `lightprune configs` lists those that do.",
        ),
        (["fit", "--config=."], "The config file '.' cannot be read: Is a directory."),
        (["fit", "--config", "bad.yaml"], "The config file 'bad.yaml' is not valid YAML at line 3, column 2: "),
        (["fit", "--config", "list.yaml"], "The config file 'list.yaml' does not hold settings by name"),
        (["fit", "--config", "empty.yaml"], "The config file 'empty.yaml' is empty"),
        (["fit", "--config", "latin.yaml"], "The config file 'latin.yaml' is not text in UTF-8"),
        (["fit", "--config", "good.yaml", "stray"], "'stray' belongs to no option of fit"),
        (["fit", "--config", "good.yaml", "--trainer.max_stepz", "3"], "(did you mean '--trainer.max_steps'?)"),
        (["fit", "--config", "good.yaml", "--optimizer", "Adam"], "--optimizer is not an option of fit"),
        (["fit", "--config", "good.yaml", "--trainer.max_steps=lots"], "trainer.max_steps is 'lots'"),
        (["fit", "--config", "good.yaml", "--model.modell", "x"], "lightprune.CausalLM has no argument 'modell'"),
        (["fit", "--config", "good.yaml", "--ckpt_path", "none.ckpt"], "There is no checkpoint at 'none.ckpt'"),
        (["export", "--config", "good.yaml"], "export needs ckpt_path and output: set them in a config file"),
        (["plan", "--config", "good.yaml", "--ckpt_path", "x"], "--ckpt_path is not an option of plan"),
    ],
)
def test_in_the_arguments(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(config()))
    (tmp_path / "bad.yaml").write_text("trainer:\n  max_steps: 3\n bad: [1\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "latin.yaml").write_bytes("model: é".encode("latin-1"))
    assert sentence in said(capsys, *arguments)


def test_what_is_not_known_is_one_line() -> None:
    """Another version of the parser may word it otherwise."""
    message = (
        "Parser key \"trainer.x\":\n  Something new\n    about it\n  Given value type: <class 'str'>\n  Given value: 3"
    )
    assert explain(message, "fit", []) == "trainer.x: Something new about it"


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"]])
def test_help_and_version(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("lightprune 0." if arguments == ["--version"] else "usage: lightprune COMMAND")
    assert ("--callback.NAME.ARGUMENT" in out) == (arguments != ["--version"])


def test_a_config_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves the `~` of `--config=~/run.yaml` as it is; the parser does not."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config()))
    assert answer(["fit", "--config=~/run.yaml"]) is None
