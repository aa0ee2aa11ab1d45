"""Scores of units and of coupled groups of weights: pure functions."""
