"""The dynamic reference ratio: the center of the ball follows the weights, slowly and within bounds."""

import numpy as np

from lightprune.reweighting.robust import Array

FROM = 0.2
"""The share of the steps after which the ratio begins to move."""

_RATE = 0.1
_REACH = 2.0


def follow(ratio: Array, weights: Array, initial: Array) -> Array:
    """One step of the ratio p towards the weights q (DRPruning, arXiv 2411.14055).

    p ← 0.9 p + 0.1 q, clipped to [½, 2] times the initial ratio, then to the least and the greatest initial ratio, and
    each time renormalized. So a domain that has long needed more may come to have more as a matter of course.

    Args:
        ratio: p [D], sum 1.
        weights: q [D], sum 1.
        initial: the ratio [D] that the run began with, sum 1. A domain that has 0 there keeps 0.

    Returns:
        p [D], sum 1.
    """
    used = initial > 0
    moved = (1 - _RATE) * ratio + _RATE * weights
    near = np.clip(moved, initial / _REACH, initial * _REACH)
    within = np.clip(near / near.sum(), initial[used].min(), initial[used].max())
    kept = np.where(used, within, 0.0)
    return np.asarray(kept / kept.sum())
