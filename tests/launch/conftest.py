"""One Slurm for all tests of this folder."""

import os
from collections.abc import Iterator

import pytest

from tests.launch.cluster import Cluster, missing_programs, slurm_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes. Without Slurm the tests are skipped, and fail where LIGHTPRUNE_REQUIRE_SLURM is set."""
    missing = missing_programs()
    if missing:
        reason = f"Slurm is not installed: no {', '.join(missing)} (Debian: slurm-wlm, munge)"
        assert not os.environ.get("LIGHTPRUNE_REQUIRE_SLURM"), reason
        pytest.skip(reason)
    with slurm_cluster() as cluster:
        yield cluster
