"""The tokenizer that goes along with a model: given, or found where modules and data modules usually keep theirs."""

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from lightprune.errors import ConfigError
from lightprune.hub import load_tokenizer
from lightprune.integrations.lightning import data_of

# Where people keep a tokenizer, or something that has one as its `tokenizer`: a processor, or a wrapper of their own.
NAMES = ("tokenizer", "processing_class", "processor")

Tokenizer = PreTrainedTokenizerBase | ProcessorMixin
"""What turns texts, and perhaps images, into a model's inputs; a processor has a tokenizer in it."""


def tokenizer_of(trainer: L.Trainer, module: L.LightningModule, data: object = None) -> Tokenizer | None:
    """The tokenizer or the processor of the module, or else of the data module; None if neither has one.

    Args:
        trainer: its data module is asked.
        module: is asked first.
        data: the data module, where the trainer does not know it.
    """
    for owner in (module, data, data_of(trainer)):
        for name in NAMES:
            found = _attribute(owner, name)
            if isinstance(found, ProcessorMixin):
                return found
            for candidate in (found, _attribute(found, "tokenizer")):
                if isinstance(candidate, PreTrainedTokenizerBase):
                    return candidate
    return None


def given_tokenizer(tokenizer: object, key: str) -> Tokenizer | None:
    """What a setting names: a tokenizer or a processor itself, or the path or Hub id of one; None for None.

    Raises:
        ConfigError: it is neither, or there is no tokenizer at that place.
    """
    if tokenizer is None or isinstance(tokenizer, PreTrainedTokenizerBase | ProcessorMixin):
        return tokenizer
    if isinstance(tokenizer, str):
        return load_tokenizer(tokenizer)
    raise ConfigError(
        f"{key} is of type {type(tokenizer).__name__}: set it to a tokenizer of transformers, or to the directory or "
        "Hub id of one."
    )


def warn_of_none(key: str) -> None:
    """Warn once that the model is exported without a tokenizer, and say what to do."""
    rank_zero_warn(
        f"No tokenizer was found, so none is exported with the model: set {key} to the tokenizer, its directory or its "
        f"Hub id, or keep it as `self.tokenizer` in the module or in the data module."
    )


def _attribute(owner: object, name: str) -> object:
    try:
        return getattr(owner, name, None)
    except Exception:  # a property of somebody else's, such as a module whose source holds no tokenizer
        return None
