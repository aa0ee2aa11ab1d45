"""Text that a language model writes itself: data for a recovery that needs no data set.

What the model to be pruned writes is distributed as its own predictions are, so training on it brings back what the
model knew, and not the style of some corpus (self-generated data: Cerebras, arXiv 2410.09982).

Shapes: B sequences that are written at once, T tokens each.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightprune.data.readers import key_of
from lightprune.errors import ConfigError, check_number
from lightprune.hub import load_causal_lm, resolve_uri


@dataclass(frozen=True)
class Generated:
    """How a domain's text is written.

    Attributes:
        model: The directory or Hub id of the model that writes; None is the model that the run is about.
        tokens: How many tokens to write, at least.
        length: How long a document may become, in tokens; one that would be longer is cut there.
        temperature: Of the sampling; 1 is the model's own distribution.
        top_p: The least share of the probability that is sampled from; 1 is all of it.
        prompts: A text file; every line begins documents in turn. None begins with BOS, or with EOS if there is none.
        batch_size: How many documents are written at once. More need more memory, and are other documents.
        seed: Of the sampling.
    """

    model: str | None = None
    tokens: int = 131_072
    length: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    prompts: str | None = None
    batch_size: int = 32
    seed: int = 0

    def check(self, domain: str) -> None:
        """Refuses values that cannot work.

        Raises:
            ConfigError: There is one.
        """
        owner = f"{key_of(domain)}.generated"
        for name in ("tokens", "length", "batch_size"):
            check_number(owner, name, getattr(self, name), whole=True, least=1)
        check_number(owner, "temperature", self.temperature, above=0)
        check_number(owner, "top_p", self.top_p, above=0, most=1)
        check_number(owner, "seed", self.seed, whole=True, least=0)
        for name in ("model", "prompts"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{owner}.{name} is {value!r}: it must be a text, or null.")

    @classmethod
    def of(cls, value: object, domain: str) -> "Generated":
        """The settings themselves, or those that a dictionary names.

        Raises:
            ConfigError: It is neither, or has other keys.
        """
        known = [field.name for field in fields(cls)]
        if isinstance(value, Generated):
            return value
        if not isinstance(value, dict) or set(value) - set(known):
            raise ConfigError(
                f"{key_of(domain)}.generated is {value!r}: it must be a mapping with some of the keys "
                f"{', '.join(known)}."
            )
        return cls(**value)

    def with_model(self, model: str | None, domain: str) -> "Generated":
        """The same with a model, if it names none.

        Raises:
            ConfigError: There is none.
        """
        if self.model is not None:
            return self
        if model is None:
            raise ConfigError(
                f"{key_of(domain)}.generated.model is null, and the module does not say which model it loads: name the "
                "directory or Hub id of the model to be pruned."
            )
        return Generated(**{**asdict(self), "model": model})

    def identity(self) -> dict[str, object]:
        """The key of the text: the settings, and size and time of the files of a model in a directory."""
        found = resolve_uri(str(self.model))
        files: list[Path] = []
        if isinstance(found, Path):
            files = sorted(found.rglob("*.safetensors")) if found.is_dir() else [found]
        stamp = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        prompts = None if self.prompts is None else _sha(Path(self.prompts).expanduser().read_bytes())
        return {**asdict(self), "files": stamp, "prompts": prompts}

    def documents(self, tokenizer: PreTrainedTokenizerBase, directory: Path, domain: str) -> Iterator[NDArray[Any]]:
        """Yields the documents as tokens, prompts included, without the tokens that open and close them.

        A batch is kept in `directory` once it is written, so a run that was killed goes on with the next one, and gives
        the same text as one that never stopped.

        Args:
            tokenizer: Of the model.
            directory: Where the batches are kept.
            domain: For the progress bar and the error messages.
        """
        directory.mkdir(parents=True, exist_ok=True)
        written = number = 0
        writer = _Writer(self, tokenizer, directory, domain)
        with writer.bar() as bar:
            while written < self.tokens:
                documents = _read(writer.batch(number))
                count = sum(len(document) for document in documents)
                written, number = written + count, number + 1
                bar.update(count)
                yield from documents

    def write_share(
        self, tokenizer: PreTrainedTokenizerBase, directory: Path, domain: str, *, place: int, places: int
    ) -> None:
        """Writes every `places`-th batch, until what all processes have written together is enough for `documents`.

        Args:
            tokenizer: Of the model.
            directory: Where the batches are kept.
            domain: For the progress bar and the error messages.
            place: Which process this is.
            places: How many processes write.
        """
        directory.mkdir(parents=True, exist_ok=True)
        counts: dict[str, int] = {}
        number = place
        writer = _Writer(self, tokenizer, directory, domain)
        with writer.bar(shown=place == 0) as bar:
            while True:
                there = {file.name for file in directory.glob("*.npz") if ".draft" not in file.name}
                new = {name: sum(map(len, _read(directory / name))) for name in there - counts.keys()}
                counts |= new
                bar.update(sum(new.values()))
                if sum(counts.values()) >= self.tokens:
                    return
                writer.batch(number)
                number += places


class _Writer:
    """Batches of a domain's text, in files of a directory; the model is loaded for the first that is not there."""

    def __init__(self, settings: Generated, tokenizer: PreTrainedTokenizerBase, directory: Path, domain: str) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._directory = directory
        self._domain = domain
        self._lm: PreTrainedModel | None = None

    def batch(self, number: int) -> Path:
        """The file of a batch, written now if it is not there."""
        file = self._directory / f"{number:06d}.npz"
        if not file.exists():
            self._lm = self._lm or _load(str(self._settings.model))
            _save(file, write(self._lm, self._tokenizer, self._settings, number, self._domain))
        return file

    def bar(self, *, shown: bool = True) -> "tqdm[Any]":
        """The progress bar, in tokens."""
        total, text = self._settings.tokens, f"Writing {self._domain}"
        return tqdm(total=total, desc=text, unit=" tokens", unit_scale=True, disable=not shown)


def write(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Generated, number: int, domain: str
) -> list[NDArray[np.int64]]:
    """Writes batch `number`: the same for the same settings, model and device.

    Returns:
        The documents, as tokens, prompts included, without the tokens that open and close them.
    """
    prompts = _prompts(tokenizer, settings, number, domain)
    longest = max(map(len, prompts))
    eos = int(tokenizer.eos_token_id)
    ids = torch.tensor([[eos] * (longest - len(prompt)) + prompt for prompt in prompts], device=lm.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=lm.device)
    with isolate_rng(), torch.no_grad():
        torch.manual_seed(int(_sha(f"{settings.seed}/{number}".encode())[:12], 16))
        output: Any = lm.generate(  # type: ignore[operator]
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=0,
            max_new_tokens=max(settings.length - longest, 1),
            eos_token_id=eos,
            pad_token_id=eos,
        )
    documents = []
    for row, prompt in zip(output.cpu().numpy(), prompts, strict=True):
        new = row[longest:]
        ended = np.flatnonzero(new == eos)
        new = new[: ended[0]] if len(ended) else new
        documents.append(np.concatenate([np.array(_text_of(prompt, tokenizer), dtype=np.int64), new]))
    return [document for document in documents if len(document)]


def _prompts(tokenizer: PreTrainedTokenizerBase, settings: Generated, number: int, domain: str) -> list[list[int]]:
    if settings.prompts is None:
        opening = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [[int(opening)]] * settings.batch_size
    path = Path(settings.prompts).expanduser()
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()] if path.is_file() else []
    if not lines:
        raise ConfigError(f"{key_of(domain)}.generated.prompts is {settings.prompts!r}: it must be a text file.")
    first = number * settings.batch_size
    chosen = [lines[(first + place) % len(lines)] for place in range(settings.batch_size)]
    return [list(map(int, tokenizer(line)["input_ids"])) for line in chosen]


def _text_of(prompt: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A prompt without the token that opens it: the ordinary blocks have a rule of their own for that."""
    opening = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    return list(prompt[1:] if prompt and prompt[0] in opening else prompt)


def _load(model: str) -> PreTrainedModel:
    """The model, on a GPU in half precision if there is one, ready to write."""
    on_gpu = torch.cuda.is_available()
    lm = load_causal_lm(model, dtype="bfloat16" if on_gpu else "float32")
    lm.eval()  # type: ignore[no-untyped-call]
    if on_gpu:
        lm.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))  # type: ignore[arg-type]
    return lm


def _read(file: Path) -> list[NDArray[Any]]:
    with np.load(file) as parts:
        return [parts[name] for name in sorted(parts.files)]


def _save(file: Path, documents: Sequence[NDArray[np.int64]]) -> None:
    draft = file.with_suffix(".draft.npz")
    np.savez(draft, allow_pickle=False, **{f"{place:06d}": document for place, document in enumerate(documents)})
    draft.rename(file)


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
