"""Tokenizes each domain once and keeps the tokens on disk, memory-mapped."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from lightprune.data.bos import Bos
from lightprune.data.readers import key_of
from lightprune.data.sources import Source
from lightprune.errors import ConfigError

_LAYOUT = 1  # part of every key: raise it when what is written below changes
BATCH = 64
"""How many documents are tokenized at once."""

_ORDER_SEED = 0


@dataclass(frozen=True)
class TokenCache:
    """The tokens of one domain, in a directory of the cache.

    The documents lie in a random order, the same on every machine and for every run's seed. So any suffix is a fair
    sample of them, and training and validation are two slices of one array, whatever the block size and the split.

    Attributes:
        directory: Holds `tokens.npy` [tokens] (uint16 or uint32), every document closed by EOS (and opened by
            BOS: see `DocumentEncoder`), and `ends.npy` [documents] (int64), the position after each document's EOS.
        blank: Documents without any text, which were left out.
    """

    directory: Path
    blank: int

    @property
    def tokens(self) -> NDArray[Any]:
        """[tokens], a read-only memory map."""
        return np.asanyarray(np.load(self.directory / "tokens.npy", mmap_mode="r"))

    @property
    def ends(self) -> NDArray[np.int64]:
        """[documents], ascending."""
        return np.asarray(np.load(self.directory / "ends.npy"))


def cache_root(cache_dir: str | None) -> Path:
    """The argument, or else the environment's `LIGHTPRUNE_CACHE`, or else `~/.cache/lightprune`."""
    return Path(cache_dir or os.environ.get("LIGHTPRUNE_CACHE") or "~/.cache/lightprune").expanduser()


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase, bos: Bos | None = None) -> str:
    """A hash of all of a tokenizer that the tokens on disk depend on.

    Args:
        tokenizer: Known by its rules, its vocabulary and its EOS token.
        bos: What documents begin with; None for whatever the text has there.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        rules = json.loads(backend.to_str())
        # What an earlier call set for itself, not a property of the tokenizer.
        rules.pop("truncation", None)
        rules.pop("padding", None)
    # Only where it applies, so that what is cached for all other tokenizers stays valid.
    opened = [] if bos is None else [f"bos {bos.token}"]
    # Until ids were looked at, the vocabulary's size alone decided, and a stream is read by this type.
    sparse = ["sparse"] if token_dtype(tokenizer) != _dtype_for(len(tokenizer)) else []
    return _sha([rules, tokenizer.eos_token_id, *opened, *sparse])


def cache_entry(root: Path, source: Source, tokenizer_id: str, *, domain: str) -> Path:
    """The directory for a domain's tokens, named by a hash of all that they depend on.

    Args:
        root: The root of the cache.
        source: The domain's text, known by `Source.identity`.
        tokenizer_id: From `tokenizer_identity`.
        domain: For the error messages.

    Raises:
        ConfigError: A file, a directory or a package of the source is missing.
    """
    kind = "streams" if source.streaming else "tokens"
    return root / kind / _sha([_LAYOUT, source.identity(domain), tokenizer_id])[:32]


def tokenize_once(
    source: Source, tokenizer: PreTrainedTokenizerBase, *, domain: str, directory: Path, bos: Bos | None = None
) -> TokenCache:
    """Opens the domain's tokens, after it has made them if they are not there yet.

    Processes may race for the same entry: each writes a directory of its own, the first to finish renames it into
    place, and the others drop theirs. A killed process leaves no half-written entry under the final name.

    Args:
        source: The domain's text.
        tokenizer: Must have an EOS token.
        domain: For the progress bar and the error messages.
        directory: From `cache_entry`.
        bos: What every document begins with; None for whatever the text has there.

    Raises:
        ConfigError: The source cannot be read, or holds no text.
    """
    if not directory.exists():
        draft = directory.with_name(f".{directory.name}-{uuid.uuid4().hex}")
        parts = parts_of(directory)
        draft.mkdir(parents=True)
        try:
            _write(draft, source, DocumentEncoder(tokenizer, bos), domain, parts)
            _rename(draft, directory)
            shutil.rmtree(parts, ignore_errors=True)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return TokenCache(directory, blank=json.loads((directory / "meta.json").read_text())["blank"])


def parts_of(directory: Path) -> Path:
    """Where text that a model writes for an entry is kept until it is whole: it stays if the process is killed."""
    return directory.with_name(f"{directory.name}.parts")


def token_dtype(tokenizer: PreTrainedTokenizerBase) -> np.dtype[Any]:
    """The smallest type on disk that holds every token id, however far apart these are: uint16 or uint32."""
    highest = max(tokenizer.get_vocab().values(), default=0)
    return _dtype_for(max(len(tokenizer), highest + 1))


def _dtype_for(ids: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if ids <= 2**16 else np.uint32)


class DocumentEncoder:
    """Makes each document into tokens, with BOS first, if there is one, and EOS last.

    Args:
        tokenizer: Must have an EOS token.
        bos: What every document begins with; None for whatever the text has there.

    Attributes:
        dtype: Of the tokens: `token_dtype`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, bos: Bos | None = None) -> None:
        self.dtype = token_dtype(tokenizer)
        self._tokenizer = tokenizer
        # Where BOS is also EOS, the EOS of the document before opens this one.
        self._opening = [] if bos is None or bos.is_eos else [bos.token]
        self._closing = [tokenizer.eos_token_id]

    def __call__(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """The tokens of each document; blank documents are left out."""
        filled = [text for text in texts if text.strip()]
        if not filled:
            return []
        # verbose=False: a document longer than the model's context is no mistake here, it is cut into blocks.
        encoded: list[list[int]] = self._tokenizer(filled, add_special_tokens=False, verbose=False)["input_ids"]
        return [self.enclosed(ids) for ids in encoded]

    def enclosed(self, ids: Sequence[int]) -> NDArray[Any]:
        """A document's tokens, opened and closed."""
        return np.array([*self._opening_of(list(ids[:1])), *ids, *self._closing], dtype=self.dtype)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return self._tokenizer

    def _opening_of(self, ids: list[int]) -> list[int]:
        written_out = ids[:1] == self._opening  # such as chats that a template has made into text
        return [] if written_out else self._opening


def no_text(domain: str, documents: int) -> ConfigError:
    """The error for a domain whose documents hold no text."""
    return ConfigError(f"{key_of(domain)} is empty: none of its {documents} documents holds any text.")


def _rename(draft: Path, directory: Path) -> None:
    try:
        draft.rename(directory)
    except OSError:
        if not directory.exists():
            raise


def _write(directory: Path, source: Source, encode: DocumentEncoder, domain: str, parts: Path) -> None:
    dtype = encode.dtype
    unordered = directory / "unordered"
    lengths, blank = _tokenize(unordered, source, encode, domain, parts)
    if not lengths:
        raise no_text(domain, blank)
    sizes = np.array(lengths, dtype=np.int64)
    ends = np.cumsum(sizes)
    order = np.random.default_rng(_ORDER_SEED).permutation(len(sizes))
    from_disk = np.memmap(unordered, dtype=dtype, mode="r")
    tokens = np.lib.format.open_memmap(directory / "tokens.npy", mode="w+", dtype=dtype, shape=(int(ends[-1]),))
    position = 0
    for document in order.tolist():
        end, size = ends[document], lengths[document]
        tokens[position : position + size] = from_disk[end - size : end]
        position += size
    tokens.flush()
    np.save(directory / "ends.npy", np.cumsum(sizes[order]))
    (directory / "meta.json").write_text(json.dumps({"domain": domain, "blank": blank}))
    unordered.unlink()


def _tokenize(path: Path, source: Source, encode: DocumentEncoder, domain: str, parts: Path) -> tuple[list[int], int]:
    """Writes the documents' tokens one after another; returns the documents' lengths and the number of blank ones."""
    lengths: list[int] = []
    if source.generated is not None:
        with path.open("wb") as file:
            for document in source.generated.documents(encode.tokenizer, parts, domain):
                tokens = encode.enclosed(document.tolist())
                file.write(tokens.tobytes())
                lengths.append(len(tokens))
        return lengths, 0
    blank = 0
    bar = tqdm(source.documents(domain), desc=f"Tokenizing {domain}", unit=" documents")
    with path.open("wb") as file, bar:
        for texts in _batches(bar, BATCH):
            documents = encode(texts)
            blank += len(texts) - len(documents)
            for tokens in documents:
                file.write(tokens.tobytes())
                lengths.append(len(tokens))
    return lengths, blank


def _batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(texts)
    while batch := list(islice(iterator, size)):
        yield batch


def _sha(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
