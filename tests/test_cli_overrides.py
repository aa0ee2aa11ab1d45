"""`--callback.NAME.ARGUMENT VALUE`: where it acts, and what it says where it cannot. Nothing is trained here."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightprune import ConfigError
from lightprune.cli import main
from lightprune.cli.app import DEFAULT_CALLBACKS, default_callbacks
from lightprune.cli.overrides import Override, apply_overrides, split_overrides

CONFIG: dict[str, Any] = {
    "trainer": {
        "callbacks": [
            {"class_path": "lightprune.LayerGateSelector", "init_args": {"drop": 2, "steps_per_round": 1}},
            {"class_path": "lightprune.GateAnnealing"},
            {"class_path": "lightprune.StructuredCut", "init_args": {"at": 6}},
        ]
    },
    "model": {"class_path": "lightprune.CausalLM", "init_args": {"model": "none"}},
}
LATER: dict[str, Any] = {
    "trainer": {
        "callbacks+": [
            {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 8}},
            {"class_path": "lightprune.DomainReweighting"},
        ]
    }
}
FILES = ["--config", "config.yaml", "--config", "later.yaml"]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configs as files; the second one appends callbacks."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "later.yaml").write_text(yaml.safe_dump(LATER))
    monkeypatch.chdir(tmp_path)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    """The callbacks that `--print_config` prints."""
    with pytest.raises(SystemExit):
        main([*arguments, "--print_config"])
    callbacks: list[dict[str, Any]] = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    return callbacks


def settings(callbacks: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The arguments of the one callback of a class."""
    (found,) = [callback for callback in callbacks if callback["class_path"].endswith(f".{name}")]
    return dict(found["init_args"])


@pytest.mark.parametrize(
    ("option", "name", "key", "value"),
    [
        (["--callback.LayerGateSelector.drop", "6"], "LayerGateSelector", "drop", 6),
        (["--callback.LayerGateSelector.drop=6"], "LayerGateSelector", "drop", 6),
        (["--callback.LayerGateSelector.lr=1e-3"], "LayerGateSelector", "lr", 1e-3),
        (["--callback.LayerGateSelector.hold_weights", "false"], "LayerGateSelector", "hold_weights", False),
        (["--callback.LayerGateSelector.patience=null"], "LayerGateSelector", "patience", None),
        (["--callback.ModelCheckpoint.every_n_train_steps", "64"], "ModelCheckpoint", "every_n_train_steps", 64),
        (["--callback.ModelCheckpoint.filename", "2024"], "ModelCheckpoint", "filename", "2024"),
        (["--callback.DomainReweighting.reference", "{a: 1.5}"], "DomainReweighting", "reference", {"a": 1.5}),
        (["--callback.DomainReweighting.reference.b", "2.5"], "DomainReweighting", "reference", {"b": 2.5}),
    ],
)
def test_sets_one_argument(
    capsys: pytest.CaptureFixture[str], option: list[str], name: str, key: str, value: object
) -> None:
    expected = printed(capsys, "fit", *FILES)
    found = printed(capsys, "fit", *FILES, *option)
    assert settings(found, name)[key] == value
    for callback in expected:
        if callback["class_path"].endswith(f".{name}"):
            callback["init_args"][key] = value
    assert found == expected


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "plan", "export"])
def test_in_every_command_and_at_any_place(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    more = ["--ckpt_path", "some.ckpt", "--output", "exported"] if verb == "export" else []
    cut, gates = ["--callback.StructuredCut.at", "7"], ["--callback.LayerGateSelector.drop=3"]
    found = printed(capsys, verb, *cut, *FILES, *more, *gates)
    assert settings(found, "StructuredCut")["at"] == 7
    assert settings(found, "LayerGateSelector")["drop"] == 3


def test_the_last_of_several_holds(capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--callback.StructuredCut.at={step}" for step in (7, 8)]
    assert settings(printed(capsys, "fit", *FILES, *options), "StructuredCut")["at"] == 8


def test_one_of_several_of_a_class_by_its_number(capsys: pytest.CaptureFixture[str]) -> None:
    second = "--trainer.callbacks+={class_path: lightprune.StructuredCut, init_args: {at: 9}}"
    found = printed(capsys, "fit", *FILES, second, "--callback.StructuredCut.1.at=10")
    assert [c["init_args"]["at"] for c in found if c["class_path"].endswith("StructuredCut")] == [6, 10]


def test_a_callback_that_every_run_has(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "fit", *FILES, "--callback.RunReport.validate_at_start", "false")
    assert found[0] == {"class_path": "lightprune.RunReport", "init_args": {"validate_at_start": False}}


def test_the_callbacks_that_every_run_has_are_those_that_can_be_set() -> None:
    assert [type(callback).__name__ for callback in default_callbacks([], progress_bar=True)] == list(DEFAULT_CALLBACKS)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (
            ["--callback.LayerGateSelecter.drop=6"],
            "--callback.LayerGateSelecter.drop: the config has no callback 'LayerGateSelecter' (did you mean "
            "'LayerGateSelector'?): it has LayerGateSelector, GateAnnealing, StructuredCut, ModelCheckpoint, "
            "DomainReweighting.",
        ),
        (["--callback.LayerGateSelector.dropp=6"], "has no argument 'dropp' (did you mean 'drop'?): it takes drop, "),
        (["--callback.LayerGateSelector.drop=many"], "LayerGateSelector.drop is 'many': it must be a whole number."),
        (["--callback.StructuredCut.3.at=6"], "the config has 1 of StructuredCut, and the number counts from 0"),
        (["--callback.StructuredCut.at"], "--callback.StructuredCut.at has no value"),
        (["--callback.StructuredCut.at", "--trainer.max_steps=3"], "--callback.StructuredCut.at has no value"),
        (["--callback.StructuredCut", "6"], "--callback.StructuredCut names no argument of a callback"),
        (["--callback.StructuredCut..at=6"], "names no argument of a callback"),
        (
            ["--trainer.callbacks+={class_path: lightprune.StructuredCut}", "--callback.StructuredCut.at=6"],
            "the config has 2 callbacks StructuredCut: say which one by its number, from --callback.StructuredCut.0.at "
            "to --callback.StructuredCut.1.at.",
        ),
        (["--trainer.callbacks=null", "--callback.StructuredCut.at=6"], "it has no callbacks"),
        (["--trainer.callbacks.init_args.drop=6"], "write --callback.LayerGateSelector.drop 6."),
        (["--trainer.callbacks.init_args.drop", "6"], "write --callback.LayerGateSelector.drop 6."),
        (["--trainer.callbacks.LayerGateSelector.drop", "6"], "write --callback.LayerGateSelector.drop 6."),
        (["--trainer.callbacks.init_args.nonsense=6"], "write --callback.NAME.nonsense 6, NAME being"),
        (["--LayerGateSelector.drop", "6"], "write --callback.NAME.drop VALUE"),
        (["--callbacks.LayerGateSelector.drop", "6"], "write --callback.NAME.drop VALUE"),
    ],
)
def test_what_cannot_be_set(capsys: pytest.CaptureFixture[str], option: list[str], sentence: str) -> None:
    assert main(["fit", *FILES, *option]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert sentence in said


def test_arguments_of_others_are_left_alone() -> None:
    others = ["fit", "--config", "a.yaml", "--trainer.callbacks+=X", "--trainer.callbacks.x=1"]
    assert split_overrides(others) == (others, [])


def test_an_argument_inside_of_a_class() -> None:
    """Keys in between are made where they are missing; what is beside them stays."""
    given = [{"class_path": "a.B", "init_args": {"rate": {"class_path": "c.D", "init_args": {"x": 1}}}}]
    override = Override("--callback.B.rate.init_args.y", "B", None, ("rate", "init_args", "y"), "2")
    (found,) = apply_overrides(given, [override], {})
    assert found["init_args"]["rate"] == {"class_path": "c.D", "init_args": {"x": 1, "y": "2"}}


def test_an_argument_that_the_config_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    more = "--trainer.callbacks+={class_path: lightprune.BlockInfluenceSelector, init_args: {stop: 2}}"
    found = printed(capsys, "fit", *FILES, more, "--callback.BlockInfluenceSelector.drop=1")
    assert settings(found, "BlockInfluenceSelector")["drop"] == 1
    assert main(["fit", *FILES, more]) == 2
    assert (
        "BlockInfluenceSelector.drop is None: it must be a whole number, or `target` a budget."
        in capsys.readouterr().err
    )


def test_no_callback_is_guessed() -> None:
    with pytest.raises(ConfigError, match="it has no callbacks"):
        apply_overrides([], [Override("--callback.B.x", "B", None, ("x",), "2")], {})
