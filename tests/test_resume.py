"""Invariant 6: kill -9 anywhere and resume in a new process; the end is that of a run that was never killed."""

import multiprocessing
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.conftest import byte_tokenizer
from tests.families import tiny_lm
from tests.resume_run import CUT, SELECT, STEPS, run

# A server that has imported everything once hands out the fresh processes.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["lightprune", "tests.resume_run"])

CASES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "in the middle of a round": ({}, [1, SELECT // 2 + 1]),
    "between rounds and after the selection": ({"hold": False}, [SELECT // 2, SELECT]),
    "in the window": ({"every": 2}, [SELECT + 3]),
    "just before the cut": ({}, [CUT - 1]),
    "at the cut": ({"accumulate": 2}, [CUT]),
    "after the cut": ({"every": 2}, [CUT + 1, STEPS - 1]),
    "everywhere, with dropout": ({"dropout": True, "accumulate": 2}, [2, SELECT + 1, CUT, CUT + 2]),
    "with block influence": ({"selector": "influence"}, [2, SELECT]),
    "with a round that ends early": ({"rounds": 1, "per round": 8, "patience": 2}, [2, 3, 4, 5, 6]),
    "saved by the validation at the cut": ({"on validation": True}, [CUT + 1]),
    "with LoRA": ({"lora": True, "dropout": True, "every": 2}, [CUT - 1, CUT + 1, STEPS - 1]),
    "with greedy perplexity": ({"selector": "perplexity"}, [2, SELECT]),
}


def in_a_process(folder: Path, case: dict[str, Any], kill: int | None = None) -> int | None:
    process = PROCESSES.Process(target=run, args=(folder, case, kill))
    process.start()
    process.join()
    return process.exitcode


def end_of(folder: Path) -> dict[str, Any]:
    # Plain values and tensors only, as in a checkpoint that is loaded with weights_only.
    end = torch.load(folder / "end.pt", weights_only=True)
    assert isinstance(end, dict)
    return end


def differences(left: Any, right: Any, path: str = "") -> list[str]:
    """Where two nested values are not the same, bit for bit."""
    if isinstance(left, torch.Tensor):
        return [] if left.dtype == right.dtype and torch.equal(left, right) else [path]
    if isinstance(left, dict):
        if left.keys() != right.keys():
            return [f"{path}: {sorted(map(str, left.keys() ^ right.keys()))}"]
        return [line for key in left for line in differences(left[key], right[key], f"{path}/{key}")]
    if isinstance(left, (list, tuple)) and len(left) == len(right):
        return [
            line for i, pair in enumerate(zip(left, right, strict=True)) for line in differences(*pair, f"{path}/{i}")
        ]
    return [] if left == right else [f"{path}: {left} != {right}"]


@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed_ends_as_if_undisturbed(name: str, tmp_path: Path) -> None:
    check(*CASES[name], tmp_path)


def test_the_shipped_module_on_text(tmp_path: Path) -> None:
    for name, letter in (("upper", "A"), ("lower", "b")):
        (tmp_path / f"{name}.txt").write_text("|".join(8 * letter + f"{i:02d}" for i in range(20)))
    tiny_lm("qwen2", vocab_size=257).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    check({"text": tmp_path}, [SELECT // 2 + 1, CUT, CUT + 2], tmp_path)


def check(case: dict[str, Any], kills: list[int], tmp_path: Path) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    assert in_a_process(undisturbed, case) == 0
    for kill in kills:
        assert in_a_process(disturbed, case, kill) == -signal.SIGKILL
        assert not (disturbed / "end.pt").exists()
    assert in_a_process(disturbed, case) == 0
    expected, actual = end_of(undisturbed), end_of(disturbed)
    assert expected["step"] == STEPS
    assert expected["cut"] == CUT
    assert expected["layers"] == 4
    assert differences(expected, actual) == []
    assert (disturbed / "last.ckpt").exists()
