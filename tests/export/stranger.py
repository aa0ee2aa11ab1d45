"""A program that has `transformers` and cannot import lightprune, and what it makes of exported directories."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SCRIPT = """
import sys
sys.modules["lightprune"] = sys.modules["tests"] = None  # importing them raises
import torch
from transformers import AutoModelForCausalLM, DynamicCache

torch.set_num_threads(1)
batch_file, seen_file, *paths = sys.argv[1:]
batch = torch.load(batch_file)
ids, mask = batch["input_ids"], batch["attention_mask"]
greedy = dict(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)


@torch.no_grad()
def look(path):
    lm, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True)
    pieces, begin, cache = [], 0, DynamicCache(config=lm.config)
    for end in range(9, ids.shape[1] + 1):
        step = lm(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        pieces.append(step.logits)
        begin = end
    cached, uncached = (lm.generate(**batch, use_cache=cache, **greedy) for cache in (True, False))
    return dict(
        kind=type(lm).__name__,
        report=[f"{name}: {keys}" for name, keys in report.items() if keys],
        logits=lm(**batch, use_cache=False).logits[mask == 1].float(),
        cached=torch.cat(pieces, dim=1)[mask == 1].float(),
        same_generation=bool(torch.equal(cached, uncached)),
        tied=lm.get_input_embeddings().weight is lm.get_output_embeddings().weight,
        parameters=sum(p.numel() for p in lm.parameters()),
        use_cache=lm.config.use_cache,
    )


torch.save({path: look(path) for path in paths}, seen_file)
"""


def seen_by_a_stranger(paths: Mapping[Any, Path], batch: dict[str, Tensor], folder: Path) -> dict[Any, dict[str, Any]]:
    """What a fresh, isolated Python makes of directories, under the names that they have in `paths`.

    For each: the class, what loading reported, logits of the tokens that are not padding (at once and with a cache),
    whether `generate` is the same with the cache and without, whether the head is the embedding, and the parameters.
    """
    torch.save(batch, folder / "batch.pt")
    arguments = [folder / "batch.pt", folder / "seen.pt", *paths.values()]
    done = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = torch.load(folder / "seen.pt")
    return {name: seen[str(path)] for name, path in paths.items()}
