"""Two processes that run every case once, for all tests of a session: importing everything costs them seconds."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ports import free_ports
from tests.strategies.runs import CASES, FINDING, OFFLOADED, STRATEGIES, WORLD, run

ROOT = Path(__file__).parents[2]
PATIENCE = 600.0


class Pair:
    """Two ranks of `tests.strategies.runs`, which write down how each case ends under each strategy."""

    def __init__(self, folder: Path, strategies: tuple[str, ...], cases: tuple[str, ...]) -> None:
        self.folder = folder
        (port,) = free_ports(1)
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, "-W", "ignore", "-m", "tests.strategies.runs", str(folder)]
        self.processes = []
        for rank in range(WORLD):
            with (folder / f"log{rank}").open("wb") as log:
                process = subprocess.Popen(
                    [*command, ",".join(strategies), ";".join(cases)],
                    cwd=ROOT,
                    env=os.environ | common | {"LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            self.processes.append(process)

    def ends(self, strategy: str, case: str) -> list[dict[str, Any]]:
        """How a case ended on each rank, once it has."""
        paths = [self.folder / f"{strategy}, {case}, {rank}.pt" for rank in range(WORLD)]
        began = time.monotonic()
        while not all(path.exists() for path in paths):
            over = any(process.poll() is not None for process in self.processes)
            if time.monotonic() - began > PATIENCE or (over and not all(path.exists() for path in paths)):
                logs = [(self.folder / f"log{rank}").read_text()[-3000:] for rank in range(WORLD)]
                pytest.fail(f"{strategy}, {case}: " + "\n".join(logs))
            time.sleep(0.2)
        ends = [torch.load(path, weights_only=True) for path in paths]
        for end in ends:
            assert "error" not in end, end["error"]
        return ends

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two processes that run everything in `CASES` under everything in `STRATEGIES`."""
    pair = Pair(tmp_path_factory.mktemp("pair"), (*STRATEGIES, *OFFLOADED, FINDING), tuple(CASES))
    yield pair
    pair.close()


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """How cases end in one process, each run once."""
    ends: dict[str, dict[str, Any]] = {}

    def end_of(case: str) -> dict[str, Any]:
        if case not in ends:
            ends[case] = run(CASES[case], "auto", tmp_path_factory.mktemp("alone"))
        return ends[case]

    return end_of
