"""Hooks on a model that can be removed without a trace: gates on layers, masks on units, and the passes they act in."""
