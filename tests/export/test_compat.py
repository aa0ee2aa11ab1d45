"""What older versions of `transformers` read: the older fields, and with such a version at hand, the logits."""

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from lightprune.anatomy import anatomy_of
from lightprune.export import export_hf
from lightprune.export.compat import LEAST, least_version
from lightprune.surgery import cut_model
from tests.export.models import word_tokenizer
from tests.export.older_transformers import SCRIPT
from tests.families import FAMILIES, combinations_of, left_padded, random_plan, tiny_lm
from tests.logits import logits_of

# Another Python, in whose environment lies version 4.57 of transformers, and PyTorch.
OLDER_PYTHON = os.environ.get("LIGHTPRUNE_OLDER_PYTHON")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 777.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}
# Of each family that keeps them in its config, positions off their defaults.
POSITIONS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "llama_tied": {"rope_parameters": LLAMA3},
    "mistral": {"rope_parameters": {"rope_type": "linear", "rope_theta": 700.0, "factor": 2.0}},
    "phi": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25}},
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    "phi3_longrope": {},
    "gemma3": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        }
    },
    "gpt2": {},
    "opt": {},
}
ELSEWHERE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}


def exported(name: str, structures: tuple[str, ...], path: Path) -> tuple[Path, torch.Tensor]:
    """A cut model of a family, exported, and its logits."""
    known = [kind for kind in POSITIONS if name.startswith(kind)]
    lm = tiny_lm(name, **(POSITIONS[max(known, key=len)] if known else ELSEWHERE)).eval()
    anatomy = anatomy_of(lm)
    cut_model(anatomy, random_plan(anatomy, structures, random.Random(name)))
    return export_hf(lm, path, tokenizer=word_tokenizer()), logits_of(lm, left_padded())


@pytest.mark.skipif(OLDER_PYTHON is None, reason="LIGHTPRUNE_OLDER_PYTHON names no Python with transformers 4.57")
def test_an_older_version_computes_the_same(tmp_path: Path) -> None:
    cells, expected = {}, {}
    for name in FAMILIES:
        lm = tiny_lm(name)
        if least_version(lm.config.to_dict()) != LEAST:
            continue
        possible = combinations_of(lm)
        for structures in [one for one in possible if len(one) == 1] + possible[-1:]:
            cell = f"{name}-{'-'.join(structures)}"
            cells[cell], expected[cell] = exported(name, structures, tmp_path / cell)
    torch.save(left_padded(), tmp_path / "batch.pt")
    arguments = [tmp_path / "batch.pt", tmp_path / "seen.pt", *cells.values()]
    assert OLDER_PYTHON is not None
    done = subprocess.run(
        [OLDER_PYTHON, "-I", "-c", SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    version, seen = torch.load(tmp_path / "seen.pt")
    errors, failed = {}, {}
    for cell, path in cells.items():
        if isinstance(seen[str(path)], str):
            failed[cell] = seen[str(path)]
            continue
        logits, words = seen[str(path)]
        assert words == [7, 8], cell
        errors[cell] = ((logits - expected[cell]).abs().max() / expected[cell].abs().max()).item()
    print(version, {cell: f"{error:.1e}" for cell, error in errors.items()})
    assert failed == {}
    assert {cell: error for cell, error in errors.items() if error > 1e-5} == {}


def test_the_older_fields_say_the_same(tmp_path: Path) -> None:
    for name, overrides in POSITIONS.items():
        lm = tiny_lm(name, num_layers=2, **overrides)
        path = export_hf(lm, tmp_path / name)
        written = json.loads((path / "config.json").read_text())
        assert written["min_transformers_version"] == "4.57", name
        assert "It needs `transformers` 4.57 or newer." in (path / "README.md").read_text()
        ours = getattr(lm.config, "rope_parameters", None)
        if ours is None:
            continue
        read = AutoConfig.from_pretrained(path).rope_parameters
        assert {key: value for key, value in read.items() if key != "type"} == ours, name
        nested = "full_attention" in ours
        main = ours["full_attention"] if nested else ours
        assert written["rope_theta"] == main["rope_theta"]
        assert written.get("partial_rotary_factor") == main.get("partial_rotary_factor")
        assert written.get("rope_local_base_freq") == (ours["sliding_attention"]["rope_theta"] if nested else None)
        scaling = written.get("rope_scaling") or {}
        assert scaling.get("rope_type", scaling.get("type", "default")) == main["rope_type"]
        assert scaling.get("factor") == (main.get("factor") if scaling.get("rope_type") else None)


def test_what_version_4_reads_otherwise_says_so(tmp_path: Path) -> None:
    for name in ("gemma2", "gpt2_inverse_scale"):
        path = export_hf(tiny_lm(name, num_layers=2), tmp_path / name)
        assert json.loads((path / "config.json").read_text())["min_transformers_version"] == "5.0"
        assert "It needs `transformers` 5.0 or newer." in (path / "README.md").read_text()


def test_the_experts_are_counted_under_the_older_name_too(tmp_path: Path) -> None:
    written = json.loads((export_hf(tiny_lm("qwen3_moe", num_layers=4), tmp_path / "out") / "config.json").read_text())
    assert written["num_experts"] == 4


def test_a_tokenizer_is_called_what_version_4_calls_it(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["w5", "<x>"], "pad_token": "w0"})

    path = export_hf(tiny_lm(num_layers=2), tmp_path / "out", tokenizer=tokenizer)

    written = json.loads((path / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["w5", "<x>"]
    assert "extra_special_tokens" not in written
    loaded = AutoTokenizer.from_pretrained(path)
    assert loaded("w7<x>w5")["input_ids"] == tokenizer("w7<x>w5")["input_ids"]
    assert loaded.all_special_tokens == tokenizer.all_special_tokens


def test_positions_that_version_4_cannot_state_are_left_to_version_5(tmp_path: Path) -> None:
    """Phi-3's older `rope_scaling` has no place for a factor of its own, and version 5 would forget it there."""
    rope = tiny_lm("phi3_longrope", num_layers=1).config.rope_parameters | {"factor": 3.0}
    path = export_hf(tiny_lm("phi3_longrope", num_layers=2, rope_parameters=rope), tmp_path / "out")
    written = json.loads((path / "config.json").read_text())
    assert written["min_transformers_version"] == "5.0"
    assert "rope_scaling" not in written
    assert AutoConfig.from_pretrained(path).rope_parameters["factor"] == 3.0
