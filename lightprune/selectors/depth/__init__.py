"""Selectors of layers."""
