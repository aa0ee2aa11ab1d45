"""Nothing of ours waits in a training step: the host reads no tensor, and ranks send no more than learning needs."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import lightprune
from tests.reweighting.runs import DOMAINS, causal_lm, text_data, write_texts
from tests.waits import Waits, cases, counted_fit, most

CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_no_part_reads_a_tensor_in_a_step(name: str) -> None:
    assert most(counted_fit(CASES[name]())) == Counter()


def test_reweighting_reads_nothing_between_updates(tmp_path: Path) -> None:
    write_texts(tmp_path)
    part = lightprune.DomainReweighting(every=9, reference=dict.fromkeys(DOMAINS, 1.0))
    steps = counted_fit([part], data=text_data(tmp_path), module=causal_lm(tmp_path))
    assert most(steps) == Counter()
    assert steps[8].total() > 0  # the update reads: what is counted is seen


def test_what_reads_is_seen() -> None:
    """The counter sees every way to a tensor's value, by the line of lightprune that takes it."""

    waits = Waits()
    waits.steps.append(Counter())
    tensor = torch.ones(3)
    source = "def read(t): return t.tolist(), t[0].item(), bool(t[0]), float(t[0]), t[t > 0], t.cpu(), int(t[0])"
    scope: dict[str, object] = {}
    exec(compile(source, "/somewhere/lightprune/part.py", "exec"), scope)  # as if a line of ours read it
    with waits:
        scope["read"](tensor)  # type: ignore[operator]
    assert waits.steps[0].total() == 7


def test_two_ranks_send_no_more_than_their_gradients() -> None:
    """Gates, masks and Taylor scores are of all ranks' gradients: one message a step. Nobody else sends any."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.waits", "2"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    rows = [line.split("|")[1:4] for line in done.stdout.splitlines() if line.startswith("| ")]
    counts = {name.strip(): int(count) for name, count, _ in rows}
    assert counts.keys() == CASES.keys(), done.stderr[-2000:]
    learning = {name for name in CASES if name.startswith(("LayerGateSelector", "HardConcreteSelector", "Taylor"))}
    assert counts == {name: int(name in learning) for name in CASES}
