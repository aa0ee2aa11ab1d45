"""What a shape loses elsewhere: sentences for shapes that tools were seen to refuse, and none for others."""

from dataclasses import replace
from typing import Any

import pytest

from lightprune.anatomy import anatomy_of
from lightprune.costs import obstacles
from lightprune.plan import PruningPlan
from tests.families import tiny_lm


def found(name: str, plan: dict[str, Any], **overrides: Any) -> list[str]:
    if name == "smollm3":  # as the released model has it; the tiny one has 3
        overrides["no_rope_layer_interval"] = 4
    anatomy = anatomy_of(tiny_lm(name, **overrides))
    made = PruningPlan.of(anatomy, **plan)
    return obstacles(made.config(anatomy).get_text_config(), made.source, made.shape)


@pytest.mark.parametrize(
    ("name", "period", "kept", "travels"),
    [
        ("smollm3", 4, [4, 5, 6, 7], True),
        ("smollm3", 4, [0, 1, 2, 3, 4], True),
        ("smollm3", 4, [0, 1, 3, 4, 5], False),
        ("gemma2", 2, [0, 1, 4, 5], True),
        ("gemma2", 2, [0, 2, 4, 5], False),
    ],
)
def test_layers_of_two_kinds(name: str, period: int, kept: list[int], travels: bool) -> None:
    sentences = found(name, {"layers": kept}, num_layers=8)
    assert bool(sentences) is not travels
    assert all(f"whole runs of {period} layers" in sentence for sentence in sentences)


def test_heads_that_do_not_fill_the_hidden_dimensions() -> None:
    heads = [[0, 1]] * 4
    (sentence,) = found("olmo2", {"heads": heads})
    assert "llama.cpp, optimum-onnx, vLLM would take a head to have 32 / 2" in sentence
    assert "With 16 hidden dimensions they would not" in sentence
    (sentence,) = found("llama_tied", {"heads": heads})
    assert "vLLM" not in sentence
    assert "CTranslate2" in sentence


def test_widths_of_packed_formats() -> None:
    anatomy = anatomy_of(tiny_lm("llama_tied"))
    source = replace(anatomy.shape, channels=1536)
    (sentence,) = obstacles(anatomy.config, source, replace(source, channels=1000))
    assert sentence.startswith("1000 MLP channels are no multiple of 32")
    assert sentence.endswith("992 would be.")
    assert obstacles(anatomy.config, source, replace(source, channels=992)) == []


def test_the_whole_model_loses_nothing() -> None:
    for name in ("llama_tied", "olmo2", "phi", "smollm3", "gemma2", "gpt2"):
        assert found(name, {}, num_layers=8) == []


def test_phi() -> None:
    anatomy = anatomy_of(tiny_lm("phi"))
    source = replace(anatomy.shape, hidden=2560, channels=10240, heads=32, kv_groups=32, head_dim=80)
    (sentence,) = obstacles(anatomy.config, source, replace(source, channels=9984))
    assert "10240, and there are 9984" in sentence
