"""A tokenizer whose tokens are bytes, so that tests can work out tokens by hand."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EOS = 256


def byte_tokenizer(*, eos: bool = True) -> PreTrainedTokenizerFast:
    """Printable ASCII characters have their own code as token id; EOS is 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # What is no printable ASCII character gets the ids that are left.
    others = iter(set(range(256)) - {ord(c) for c in alphabet if "!" <= c <= "~"})
    vocabulary = {c: ord(c) if "!" <= c <= "~" else next(others) for c in alphabet} | {"<eos>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"eos_token": "<eos>"} if eos else {}))


def tokens_of(text: str) -> list[int]:
    """What `byte_tokenizer` must make of a document of printable ASCII without spaces."""
    return [*text.encode("ascii"), EOS]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()
