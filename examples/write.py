"""How causal LMs go on from the same few words: `python examples/write.py MODEL [MODEL ...]`.

A model is whatever `lightprune.CausalLM` takes: a Hub id, a local directory, a .gguf file, or pkg://<package>/<file>.
"""

import sys

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightprune.hub import load_causal_lm, load_tokenizer

BEGINNINGS = ("The capital of France is", "Once upon a time", "Water boils when")
NEW_TOKENS = 20


@torch.no_grad()
def continued(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, beginning: str) -> str:
    """The beginning and the likeliest next tokens, on one line; what was said already is made a little less likely."""
    inputs = tokenizer(beginning, return_tensors="pt")
    written = lm.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, repetition_penalty=1.2)
    return " ".join(tokenizer.decode(written[0], skip_special_tokens=True).split())


def main(uris: list[str]) -> None:
    """Print what each model writes."""
    for uri in uris:
        lm, tokenizer = load_causal_lm(uri).eval(), load_tokenizer(uri)
        print(f"{uri} ({lm.num_parameters():,} parameters) writes")
        for beginning in BEGINNINGS:
            print(f"    {continued(lm, tokenizer, beginning)}")


if __name__ == "__main__":
    main(sys.argv[1:])
