"""What the export tests write: a small cut model, and a tokenizer."""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightprune.anatomy import anatomy_of
from lightprune.plan import PruningPlan
from lightprune.surgery import cut_model
from tests.families import VOCABULARY


def without_middle_layers(lm: PreTrainedModel) -> PruningPlan:
    """Cut layers 1 and 2 out of a model, and hand back the plan."""
    anatomy = anatomy_of(lm)
    plan = PruningPlan.dropping(anatomy, [1, 2], selector="by hand", scores=[[0.5, 0.1]])
    cut_model(anatomy, plan)
    return plan


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer to which `w7` is token 7."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")


def files_in(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}
