"""Selectors of heads, key-value groups, channels and hidden dimensions."""
