"""Hooks on a model that leave no trace: gates on layers, masks on units, and the forward passes that they act in."""
