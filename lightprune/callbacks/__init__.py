"""Callbacks around a run: progress bar, report, preemption, random state. They decide nothing about the model."""
