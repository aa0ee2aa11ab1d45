"""The model out: an ordinary Hugging Face directory, reloaded and compared before it takes its name."""

from lightprune.export.callback import ExportHF, card_of
from lightprune.export.card import Card, model_card
from lightprune.export.target import check_target
from lightprune.export.tokenizer import given_tokenizer, tokenizer_of, warn_of_none
from lightprune.export.verify import verify_export
from lightprune.export.write import export_hf

__all__ = [
    "Card",
    "ExportHF",
    "card_of",
    "check_target",
    "export_hf",
    "given_tokenizer",
    "model_card",
    "tokenizer_of",
    "verify_export",
    "warn_of_none",
]
