"""The model out: an ordinary Hugging Face directory, reloaded and compared before it takes its name."""

from lightprune.export.callback import ExportHF, card_of, tokenizer_of
from lightprune.export.card import Card, model_card
from lightprune.export.verify import verify_export
from lightprune.export.write import check_target, export_hf

__all__ = ["Card", "ExportHF", "card_of", "check_target", "export_hf", "model_card", "tokenizer_of", "verify_export"]
