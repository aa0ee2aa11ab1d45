"""The verb `benchmark`: models side by side, as a table and as JSON."""

import json
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lightprune.benchmark import Document, Sweep, benchmark
from lightprune.cli.forecast import scaled
from lightprune.cli.trainer import ServedDtype
from lightprune.errors import ConfigError, check_number
from lightprune.hub import load_causal_lm

DESCRIPTION = """Measure models side by side: seconds to the first token, and tokens a second after it, against what
their sizes promise. Speed-ups are those over the first model. MODELS are directories, Hub ids, or .gguf files."""


def run_benchmark(arguments: Sequence[str]) -> None:
    """Measure what the arguments name, print the table, and write the JSON.

    Raises:
        ConfigError: an argument is not possible, or a model cannot be loaded.
    """
    try:
        given = parser().parse_args(list(arguments))
    except ArgumentError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"{reason}: see lightprune benchmark --help.") from error
    sweep = Sweep(tuple(given.prompts), tuple(given.batch_sizes), given.tokens, given.repeats, given.warmup)
    _check(given.models, sweep, given.threads)
    device = _device(given.device)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    models = {name: load_causal_lm(name, dtype=given.dtype).to(device).eval() for name in given.models}  # type: ignore[arg-type]
    with Progress(transient=True) as bar:
        task = bar.add_task("Measuring", total=None)
        document = benchmark(models, sweep, lambda done, turns: bar.update(task, completed=done, total=turns))
    Console().print(shown(document))
    if given.output is not None:
        Path(given.output).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def shown(document: Document) -> Table:
    """The document for a terminal: a column for each model."""
    title = f"{document['device']}, {document['dtype']}, {document['threads']} threads"
    table = Table("", title=title, title_justify="left")
    for model in document["models"]:
        table.add_column(Path(model["name"]).name, justify="right")
    for row in _rows(document["models"]):
        table.add_row(*row)
    return table


def _rows(models: Sequence[Document]) -> Iterator[Sequence[str]]:
    yield ["parameters", *(f"{model['parameters']:,}" for model in models)]
    yield ["weights", *(scaled(model["weights"], "B") for model in models)]
    yield ["KV cache of a token", *(scaled(model["cache_per_token"], "B") for model in models)]
    if all(model["peak"] is not None for model in models):
        yield ["most memory in its turns", *(scaled(model["peak"], "B") for model in models)]
    for runs in zip(*(model["runs"] for model in models), strict=True):
        batch, prompt = runs[0]["batch"], runs[0]["prompt"]
        yield [f"{batch} x {prompt}: first token, ms", *(_milliseconds(run["first"]) for run in runs)]
        yield ["  speed-up, of the ideal", *(_reached(run, "first") for run in runs)]
        yield [f"{batch} x {prompt}: tokens a second", *(f"{batch / run['token']['median']:.1f}" for run in runs)]
        yield ["  speed-up, of the ideal", *(_reached(run, "token") for run in runs)]


def _milliseconds(seconds: Document) -> str:
    half = (seconds["greatest"] - seconds["least"]) / 2
    return f"{1000 * seconds['median']:.1f} ± {1000 * half:.1f}"


def _reached(run: Document, key: str) -> str:
    return f"{run['speedup'][key]:.2f} ({run['reached'][key]:.0%} of {run['ideal'][key]:.2f})"


def parser() -> ArgumentParser:
    """The arguments of the verb."""
    made = ArgumentParser(prog="lightprune benchmark", description=DESCRIPTION, exit_on_error=False)
    made.add_argument(
        "models", nargs="+", type=str, help="what is measured; the first is what others are compared with"
    )
    made.add_argument("--prompts", nargs="+", type=int, default=[128, 512], help="tokens of a prompt")
    made.add_argument("--batch_sizes", nargs="+", type=int, default=[1], help="sequences beside each other")
    made.add_argument("--tokens", type=int, default=32, help="tokens generated after a prompt")
    made.add_argument("--repeats", type=int, default=5, help="rounds; every model has its turn in each")
    made.add_argument("--warmup", type=int, default=1, help="rounds before them")
    made.add_argument("--dtype", type=ServedDtype, default="float32", help="of weights")
    made.add_argument("--device", type=str, default="auto", help="cpu, cuda, cuda:1, ...; auto is CUDA if it is there")
    made.add_argument("--threads", type=int | None, default=None, help="of the CPU; null for PyTorch's choice")
    made.add_argument("--output", type=str | None, default=None, help="a JSON file for all numbers")
    return made


def _check(models: Sequence[str], sweep: Sweep, threads: int | None) -> None:
    if len(set(models)) < len(models):
        raise ConfigError(f"benchmark: {', '.join(models)} names a model twice; name each once.")
    for key, values in (("prompts", sweep.prompts), ("batch_sizes", sweep.batches)):
        for value in values:
            check_number("benchmark", key, value, whole=True, least=1)
    for key, value, least in (("tokens", sweep.tokens, 1), ("repeats", sweep.repeats, 1), ("warmup", sweep.warmup, 0)):
        check_number("benchmark", key, value, whole=True, least=least)
    check_number("benchmark", "threads", threads, whole=True, least=1, optional=True)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"benchmark.device is {name!r}, which is not there ({reason}): use cpu, cuda or auto."
        ) from error
    return device
