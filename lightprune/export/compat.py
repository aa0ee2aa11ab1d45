"""What older versions of `transformers` need besides what version 5 writes, and which versions read the result."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, ProcessorMixin

from lightprune.export.tokenizer import Tokenizer

# Families of which version 4.57 loads what is written here with the logits of version 5; checked by
# `tests/export/test_compat.py`. Not Gemma 2: 4.57 attends by sdpa unless told otherwise, which leaves out its soft cap.
READ_BY_4 = frozenset(
    {
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
    }
)
LEAST, LEAST_OF_OTHERS = "4.57", "5.0"
LEAST_KEY = "min_transformers_version"

# Entries of `rope_parameters` that version 4 keeps beside its `rope_scaling`.
_BESIDE_SCALING = ("rope_theta", "partial_rotary_factor")


def complete_config(path: Path, *, dtype: torch.dtype) -> None:
    """Add to a directory's `config.json` what older versions read, and which versions these are.

    Args:
        path: the directory.
        dtype: that of most weights, which "auto" loads all of them in.
    """
    file = path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    older = config | older_fields(config)
    same = _positions(older) == _positions(config)
    config = older if same else config
    config[LEAST_KEY] = least_version(config) if same else LEAST_OF_OTHERS
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _positions(config: Mapping[str, Any]) -> Any:
    """What this version reads of rotary positions in a `config.json`."""
    if config["model_type"] not in CONFIG_MAPPING:
        return None
    read = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))
    rope = getattr(read, "rope_parameters", None)
    return None if rope is None else {name: value for name, value in rope.items() if name != "type"}


def least_version(config: Mapping[str, object]) -> str:
    """The least version of `transformers` that computes the same from a config with the older fields."""
    # 4.57 scales the scores of GPT-2's layers by their index only where it attends eagerly.
    read = config["model_type"] in READ_BY_4 and not config.get("scale_attn_by_inverse_layer_idx")
    return LEAST if read else LEAST_OF_OTHERS


def requirement(path: Path) -> str:
    """What a directory needs to be loaded, as a sentence."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return f"It needs `transformers` {config[LEAST_KEY]} or newer."


def older_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Version 4's names for what version 5 calls otherwise: what lies in `rope_parameters`, 4 passes over silently.

    Version 5 reads them too, and takes them for the same.
    """
    fields: dict[str, object] = {}
    if config["model_type"] == "qwen3_moe" and "num_local_experts" in config:
        fields["num_experts"] = config["num_local_experts"]
    rope = config.get("rope_parameters")
    if not rope:
        return fields
    if isinstance(rope.get("full_attention"), Mapping):  # one for each kind of layer, as Gemma 3 has it
        if "sliding_attention" in rope:
            fields["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    fields |= {name: rope[name] for name in _BESIDE_SCALING if name in rope}
    if config["model_type"] == "gpt_neox":
        fields |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope.get("partial_rotary_factor", 1.0)}
    if rope.get("rope_type", "default") != "default":
        fields["rope_scaling"] = _scaling(config, rope)
    return fields


def _scaling(config: Mapping[str, object], rope: Mapping[str, object]) -> dict[str, object]:
    scaling = {name: value for name, value in rope.items() if name not in _BESIDE_SCALING}
    if config["model_type"] == "phi3":  # which takes exactly these
        return {"type": scaling["rope_type"]} | {n: scaling[n] for n in ("short_factor", "long_factor") if n in scaling}
    return scaling


def complete_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """Add to a saved tokenizer what version 4 needs; version 5 reads it as before.

    Version 5 calls its own class `TokenizersBackend`, and lists special tokens under a name that in 4 is a mapping. For
    a Llama's tokenizer, 4 takes for granted that texts open with BOS.
    """
    file = path / "tokenizer_config.json"
    if not file.exists():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if config.get("tokenizer_class") == "LlamaTokenizer":
        of_text: Any = tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer
        config.setdefault("add_bos_token", of_text.bos_token_id in of_text("a")["input_ids"])
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
