"""The verb `benchmark` on real models: the work is really done, and every number comes from the document."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightprune.anatomy import anatomy_of
from lightprune.benchmark import Sweep, benchmark
from lightprune.benchmark.speed import taken
from lightprune.cli import main
from lightprune.costs import Workload, costs_of
from lightprune.plan import PruningPlan
from lightprune.surgery import cut_model
from tests.families import tiny_lm

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
SETTINGS = ["--prompts", "16", "32", "--batch_sizes", "2", "--tokens", "4", "--repeats", "3", "--threads", "1"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model of 12 layers, and the same with 2 of them."""
    folder = tmp_path_factory.mktemp("models")
    lm = tiny_lm("llama", num_layers=12, max_position_embeddings=128, **SIZES)
    lm.save_pretrained(folder / "whole")
    anatomy = anatomy_of(lm)
    cut_model(anatomy, PruningPlan.keeping(anatomy, layers=[0, 11]))
    lm.save_pretrained(folder / "cut")
    return [str(folder / "whole"), str(folder / "cut")]


def test_the_table_and_the_document(models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert main(["benchmark", *models, *SETTINGS, "--output", str(tmp_path / "speed.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    document = json.loads((tmp_path / "speed.json").read_text())
    assert (document["device"], document["dtype"], document["threads"]) == ("cpu", "float32", 1)
    out = capsys.readouterr().out
    of_models = []
    for path, found in zip(models, document["models"], strict=True):
        lm = AutoModelForCausalLM.from_pretrained(path)
        anatomy = anatomy_of(lm)
        costs = [costs_of(anatomy, PruningPlan.of(anatomy), Workload(prompt, prompt + 2, 2)) for prompt in (16, 32)]
        of_models.append(costs)
        assert found["name"] == path
        assert found["parameters"] == lm.num_parameters()
        assert found["weights"] == costs[0].weights
        assert f"{lm.num_parameters():,}" in out
        assert [(run["batch"], run["prompt"]) for run in found["runs"]] == [(2, 16), (2, 32)]
    whole, cut = document["models"]
    for index, (slow, fast) in enumerate(zip(whole["runs"], cut["runs"], strict=True)):
        assert slow["speedup"] == slow["ideal"] == slow["reached"] == {"first": 1.0, "token": 1.0}
        assert fast["ideal"]["first"] == of_models[0][index].prefill / of_models[1][index].prefill
        assert fast["ideal"]["token"] == of_models[0][index].decode_bytes / of_models[1][index].decode_bytes
        for key in ("first", "token"):
            assert 0 < fast[key]["least"] <= fast[key]["median"] <= fast[key]["greatest"]
            assert fast["speedup"][key] > 1.5  # with a sixth of the layers
            assert fast["reached"][key] == fast["speedup"][key] / fast["ideal"][key]
        assert f"{fast['speedup']['first']:.2f} ({fast['reached']['first']:.0%}" in out
        assert f"{2 / fast['token']['median']:.1f}" in out


def test_what_is_timed_is_greedy_generation() -> None:
    lm = tiny_lm("llama_tied").eval()
    prompt = torch.arange(1, 9).unsqueeze(0)
    read: list[torch.Tensor] = []
    hook = lm.register_forward_pre_hook(lambda m, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True)
    taken(lm, prompt, 5)
    hook.remove()
    expected = lm.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    torch.testing.assert_close(torch.cat(read, dim=1), expected)
    assert [len(ids[0]) for ids in read] == [8, 1, 1, 1, 1, 1]


def test_models_take_turns() -> None:
    """There and back, so that none is always second."""
    order: list[str] = []

    def named(name: str) -> PreTrainedModel:
        lm = tiny_lm("llama_tied").eval()
        lm.register_forward_pre_hook(lambda *_: order.append(name))
        return lm

    seen: list[tuple[int, int]] = []
    sweep = Sweep(prompts=(4,), tokens=1, repeats=2, warmup=1)
    benchmark({"a": named("a"), "b": named("b")}, sweep, lambda done, turns: seen.append((done, turns)))
    assert "".join(order[::2]) == "abbaab"
    assert seen == [(done, 6) for done in range(1, 7)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required: models"),
        (["nowhere/at/all"], "There is no file or directory 'nowhere/at/all'"),
        (["MODEL", "MODEL"], "names a model twice"),
        (["MODEL", "--prompts", "0"], "benchmark.prompts is 0: it must be at least 1."),
        (["MODEL", "--repeats", "0"], "benchmark.repeats is 0: it must be at least 1."),
        (["MODEL", "--device", "cuda:7"], "benchmark.device is 'cuda:7', which is not there"),
        (["MODEL", "--promts", "8"], "unrecognized arguments: --promts 8"),
        (["MODEL", "--dtype", "int8"], "int8"),
    ],
)
def test_mistakes(models: list[str], arguments: list[Any], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [models[0] if argument == "MODEL" else argument for argument in arguments]
    assert main(["benchmark", *given]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
