"""Resident memory of this process (Linux)."""

import re
from pathlib import Path


def memory_of(kind: str) -> int:
    """Resident bytes, now (VmRSS) or at their highest (VmHWM): what getrusage tells survives exec."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024 if found else 0


def forget_peak() -> None:
    """Let VmHWM begin anew."""
    Path("/proc/self/clear_refs").write_text("5")
