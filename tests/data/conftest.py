"""A tokenizer whose tokens are bytes, so that tests can work out tokens by hand."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lightprune.data.blocks import Blocks

EOS = 256
BOS = 257


def byte_tokenizer(*, eos: bool = True, bos: str | None = None, puts_bos: bool = True) -> PreTrainedTokenizerFast:
    """Printable ASCII characters have their own code as token id; EOS is 256.

    Args:
        eos: Whether there is an EOS token.
        bos: "<bos>" gives it a BOS token, 257; "<eos>" makes EOS that too, as in OPT.
        puts_bos: Whether calling the tokenizer puts this first, as Gemma's does, or not, as SmolLM2's.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # What is no printable ASCII character gets the ids that are left.
    others = iter(set(range(256)) - {ord(c) for c in alphabet if "!" <= c <= "~"})
    vocabulary = {c: ord(c) if "!" <= c <= "~" else next(others) for c in alphabet} | {"<eos>": EOS}
    if bos == "<bos>":
        vocabulary[bos] = BOS
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"eos_token": "<eos>"} if eos else {}
    if bos is not None:
        special["bos_token"] = bos
        if puts_bos:
            template = [(bos, vocabulary[bos])]
            tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=template)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def rows_of(blocks: Blocks) -> list[list[int]]:
    """The tokens of all blocks."""
    return [blocks[number].tolist() for number in range(blocks.count)]


def tokens_of(text: str) -> list[int]:
    """What `byte_tokenizer` must make of a document of printable ASCII without spaces."""
    return [*text.encode("ascii"), EOS]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()
