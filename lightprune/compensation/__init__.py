"""Compensation: what stays is refitted in closed form, so that the cut model computes what the dense one did."""

from lightprune.compensation.callback import LeastSquaresCompensation

__all__ = ["LeastSquaresCompensation"]
