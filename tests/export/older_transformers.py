"""A program for another Python with an older `transformers`: the logits, and tokens, that it gets from directories."""

SCRIPT = """
import sys
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
batch_file, seen_file, *paths = sys.argv[1:]
batch = torch.load(batch_file)
seen = {}
for path in paths:
    try:
        lm = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        with torch.no_grad():
            logits = lm(**batch, use_cache=False).logits[batch["attention_mask"] == 1].float()
        seen[path] = logits, AutoTokenizer.from_pretrained(path)("w7 w8")["input_ids"]
    except Exception as error:
        seen[path] = f"{type(error).__name__}: {error}"
torch.save((transformers.__version__, seen), seen_file)
"""
