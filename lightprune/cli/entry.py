"""`main`: the entry point, which imports torch only for what needs it."""

import gc
import os
import sys
from collections.abc import Sequence

from lightprune.cli import early, shipped
from lightprune.cli.collection import no_collection
from lightprune.errors import ConfigError, ExportError


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; a mistake of the user's, or an export that failed, is one sentence on stderr and status 2.

    Args:
        args: the arguments; None for those of the process. LIGHTPRUNE_DEBUG=1 in the environment shows tracebacks.

    Returns:
        The exit status.
    """
    arguments = shipped.resolve(sys.argv[1:] if args is None else args)
    try:
        answer = early.answer(arguments)
        if answer is None:
            _run(arguments)
        else:
            print(answer, end="")
    except Exception as error:
        mistake = _user_mistake(error)
        if mistake is None or os.environ.get("LIGHTPRUNE_DEBUG") == "1":
            raise
        print(mistake, file=sys.stderr)
        return 2
    return 0


def _run(arguments: list[str]) -> None:
    if arguments[0] == "benchmark":
        from lightprune.cli.benchmark import run_benchmark

        run_benchmark(arguments[1:])
        return
    first = "lightprune.cli.app" not in sys.modules
    with no_collection():
        from lightprune.cli.app import LightpruneCLI  # imports torch and Lightning
    if first:
        gc.freeze()
    LightpruneCLI(arguments)


def _user_mistake(error: Exception) -> str | None:
    """What the user got wrong, if `error` is about that."""
    if isinstance(error, ConfigError | ExportError):
        return str(error)
    from lightprune.cli.mistakes import user_mistake  # knows the errors of Lightning

    return user_mistake(error)
