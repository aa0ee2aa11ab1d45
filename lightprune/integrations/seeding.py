"""The global random generators of Python, NumPy and PyTorch, seeded together."""

import random

import numpy as np
import torch


def seed_generators(*key: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators by non-negative integers; different keys are unrelated."""
    for_python, for_numpy, for_torch = np.random.SeedSequence(key).generate_state(3, np.uint64).tolist()
    random.seed(for_python)
    np.random.seed(for_numpy % 2**32)
    torch.manual_seed(for_torch % 2**63)
