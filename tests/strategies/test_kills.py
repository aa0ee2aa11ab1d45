"""kill -9 of one rank or both anywhere around the cut: a new start ends like the run that was never disturbed.

`LIGHTPRUNE_KILLS=100 python -m pytest tests/strategies/test_kills.py` makes 100 trials under each strategy.
"""

import os
import signal
from pathlib import Path

import pytest
import torch

from tests.strategies.conftest import Pair
from tests.strategies.kills import Death, start
from tests.strategies.runs import MOMENTS, STEPS, STRATEGIES, WORLD

TRIALS = int(os.environ.get("LIGHTPRUNE_KILLS", 5))


@pytest.mark.parametrize("trial", range(TRIALS))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_killed_ranks_and_a_new_start_end_like_the_undisturbed_run(
    strategy: str, trial: int, pair: Pair, tmp_path: Path
) -> None:
    death = Death.drawn(f"{strategy} {trial}")
    statuses = start(strategy, tmp_path, death)
    if death.hook is not None:  # a while may be over after the end
        assert {statuses[rank] for rank in death.ranks} == {-signal.SIGKILL}, death
        assert 0 not in statuses, death
        assert start(strategy, tmp_path) == [0] * WORLD, (death, (tmp_path / "log0").read_text()[-3000:])
    elif 0 not in statuses or -signal.SIGKILL in statuses:
        assert start(strategy, tmp_path) == [0] * WORLD, (death, (tmp_path / "log0").read_text()[-3000:])
    expected = pair.ends(strategy, "annealed, accumulating 1")[0]
    for rank in range(WORLD):
        end = torch.load(tmp_path / f"end{rank}.pt", weights_only=True)
        assert end["step"] == STEPS, death
        for key in ("weights", *MOMENTS):
            assert [name for name in end[key] if not torch.equal(end[key][name], expected[key][name])] == [], death
