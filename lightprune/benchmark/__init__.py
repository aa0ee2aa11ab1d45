"""How fast models run beside each other: prompts and generated tokens, against what their sizes promise."""

from lightprune.benchmark.run import Document, benchmark
from lightprune.benchmark.speed import Sweep

__all__ = ["Document", "Sweep", "benchmark"]
