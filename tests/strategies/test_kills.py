"""kill -9 of one rank or both anywhere around the cut: a new start ends like the run that was never disturbed.

`LIGHTPRUNE_KILLS=100 python -m pytest tests/strategies/test_kills.py` makes 100 trials under each strategy.
"""

import os
import signal
from pathlib import Path

import pytest
import torch

from tests.strategies.conftest import Pair
from tests.strategies.kills import GRACE, Death, started, statuses
from tests.strategies.runs import CUT, MOMENTS, STEPS, STRATEGIES, WORLD

TRIALS = int(os.environ.get("LIGHTPRUNE_KILLS", 5))


@pytest.mark.parametrize("trial", range(TRIALS))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_killed_ranks_and_a_new_start_end_like_the_undisturbed_run(
    strategy: str, trial: int, pair: Pair, tmp_path: Path
) -> None:
    death = Death.drawn(f"{strategy} {trial}")
    first = statuses(strategy, tmp_path, death)
    if death.hook is not None:  # else the run may end before its time has come
        assert {first[rank] for rank in death.ranks} == {-signal.SIGKILL}, death
        assert 0 not in first, death
    if first != [0] * WORLD:
        assert statuses(strategy, tmp_path) == [0] * WORLD, (death, (tmp_path / "log0").read_text()[-3000:])
    expected = pair.ends(strategy, "annealed, accumulating 1")[0]
    for rank in range(WORLD):
        end = torch.load(tmp_path / f"end{rank}.pt", weights_only=True)
        assert end["step"] == STEPS, death
        for key in ("weights", *MOMENTS):
            assert [name for name in end[key] if not torch.equal(end[key][name], expected[key][name])] == [], death


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
@pytest.mark.parametrize("fate", ["hangs", "never comes"])
def test_a_rank_without_the_other_gives_up_in_time(strategy: str, fate: str, tmp_path: Path) -> None:
    death = Death(ranks=(1,), hook="on_train_batch_start", when=CUT, by=signal.SIGSTOP) if fate == "hangs" else None
    absent = () if fate == "hangs" else (1,)
    with started(strategy, tmp_path, death, timeout=5, absent=absent) as processes:
        processes[0].join(GRACE)
        assert processes[0].exitcode not in (None, 0)
