"""Scores of units in a running fit: against hooks, plain autograd and formulas written out over all tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightprune import ActivationUnitSelector, ConfigError, MagnitudeUnitSelector, TaylorUnitSelector
from lightprune.anatomy import Unit, anatomy_of
from lightprune.importance.groups import unit_norms, unit_ranges
from lightprune.selectors.width.units import UnitSelector
from tests.families import FAMILIES, NUM_LAYERS, left_padded, tiny_lm
from tests.training import Batch, Plain, Spy, assert_equal, batches, fit, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*MLP channels are no multiple of 64"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated"),
]

# Where channels and heads are read, and everything that is written to the residual stream, layer by layer and outside.
LLAMA = {
    "channels": "model.layers.{}.mlp.down_proj",
    "heads": "model.layers.{}.self_attn.o_proj",
    "written": ("model.embed_tokens",),
    "norms": ("model.layers.{}.input_layernorm", "model.layers.{}.post_attention_layernorm", "model.norm"),
}
PLACES: dict[str, dict[str, Any]] = {
    "llama_tied": LLAMA,
    "phi3": LLAMA,
    "gpt2": {
        "channels": "transformer.h.{}.mlp.c_proj",
        "heads": "transformer.h.{}.attn.c_proj",
        "written": ("transformer.wte", "transformer.wpe"),
        "norms": ("transformer.h.{}.ln_1", "transformer.h.{}.ln_2", "transformer.ln_f"),
    },
    "gpt_neox": {
        "channels": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        "heads": "gpt_neox.layers.{}.attention.dense",
        "written": ("gpt_neox.embed_in",),
        "norms": (
            "gpt_neox.layers.{}.input_layernorm",
            "gpt_neox.layers.{}.post_attention_layernorm",
            "gpt_neox.final_layer_norm",
        ),
    },
    "opt": {  # its MLP and the norm in front see tokens [B * T, d]
        "channels": "model.decoder.layers.{}.fc2",
        "heads": "model.decoder.layers.{}.self_attn.out_proj",
        "written": ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        "norms": (
            "model.decoder.layers.{}.self_attn_layer_norm",
            "model.decoder.layers.{}.final_layer_norm",
            "model.decoder.final_layer_norm",
        ),
    },
}
NAMES = tuple(PLACES)
UNITS: tuple[Unit, ...] = ("heads", "channels", "hidden")
HEAD_DIM = 8
# What stays, in a window of two steps: in these models heads and hidden dimensions can only go together.
KEEP: dict[str, Any] = {"heads": 2, "channels": 16, "hidden": 16, "stop": 2}


def padded(count: int) -> list[Batch]:
    drawn = [left_padded(seed=seed) for seed in range(count)]
    return [b | {"labels": b["input_ids"].masked_fill(b["attention_mask"] == 0, -100)} for b in drawn]


def modules(lm: PreTrainedModel, paths: str | Sequence[str]) -> list[nn.Module]:
    """The modules at some paths; one with braces stands for every layer's."""
    names = [paths] if isinstance(paths, str) else paths
    full = [name.format(i) for name in names for i in range(NUM_LAYERS if "{}" in name else 1)]
    return [lm.get_submodule(name) for name in full]


def seen_at(
    lm: PreTrainedModel, batch: Batch, sites: Sequence[nn.Module], place: str, backward: bool = False
) -> list[tuple[Tensor, Tensor | None]]:
    """Each module's input, or output, in a pass over a batch, [N, m], and its gradient; in double precision."""
    found: dict[nn.Module, Tensor] = {}

    def remember(module: nn.Module, inputs: Any, output: Any) -> None:
        found[module] = inputs[0] if place == "input" else output
        if backward:
            found[module].retain_grad()

    handles = [site.register_forward_hook(remember) for site in sites]
    loss = lm(**batch, use_cache=False).loss
    if backward:
        loss.backward()
    for handle in handles:
        handle.remove()
    width = [found[site].shape[-1] for site in sites]
    values = [found[site].detach().reshape(-1, m).double() for site, m in zip(sites, width, strict=True)]
    slopes = [
        found[site].grad.reshape(-1, m).double() if backward else None for site, m in zip(sites, width, strict=True)
    ]
    return list(zip(values, slopes, strict=True))


def fitted(lm: PreTrainedModel, selector: UnitSelector, data: list[Batch], **kwargs: Any) -> Mapping[Unit, Tensor]:
    """The scores just before the selector decides; the weights must not have moved by then."""
    spy = Spy(lambda trainer, _: selector.scores())
    module = Plain(lm)
    before = weights(module)
    fit(module, [spy, selector], data, max_steps=2, **kwargs)
    assert_equal(weights(module), before)
    assert selector.plan is not None
    return spy.seen[-1]


def matrix(module: nn.Module) -> Tensor:
    """A projection's weight [out, in], whichever way the module stores it."""
    weight = module.weight.detach().double()
    assert isinstance(weight, Tensor)
    return weight if isinstance(module, nn.Linear) else weight.T


def activation_score(values: Tensor, columns: Tensor, metric: str) -> float:
    """Of one unit: its activations [N, r] at the tokens that are not padding, and the columns [out, r] that read it."""
    lengths = values.square().sum(1).sqrt()
    if metric == "mean":
        return float(lengths.mean() * columns.square().sum().sqrt())
    if metric == "l2":
        return float((lengths.square().mean() * columns.square().sum()).sqrt())
    mean = values.mean(0)
    return float(((values - mean).square().mean(0) * columns.square().sum(0)).sum())


@pytest.mark.parametrize("metric", ["mean", "l2", "fluctuation"])
@pytest.mark.parametrize("name", NAMES)
def test_activations_of_heads_and_channels(name: str, metric: Any) -> None:
    lm, data = tiny_lm(name), padded(2)
    real = [batch["attention_mask"].flatten().bool() for batch in data]
    expected: dict[Unit, list[list[float]]] = {}
    for unit, rows in (("heads", HEAD_DIM), ("channels", 1)):
        sites = modules(lm, PLACES[name][unit])
        passes = [seen_at(lm, batch, sites, "input") for batch in data]
        expected[unit] = []
        for index, site in enumerate(sites):
            values = torch.cat([seen[index][0][kept] for seen, kept in zip(passes, real, strict=True)])
            pairs = zip(values.split(rows, dim=1), matrix(site).split(rows, dim=1), strict=True)
            expected[unit].append([activation_score(of_unit, columns, metric) for of_unit, columns in pairs])
    scores = fitted(lm, ActivationUnitSelector(**KEEP, metric=metric, weighted=True), data)
    for unit, of_layers in expected.items():
        torch.testing.assert_close(scores[unit], torch.tensor(of_layers).double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("metric", ["mean", "l2", "fluctuation"])
@pytest.mark.parametrize("name", NAMES)
def test_activations_of_hidden_dimensions(name: str, metric: Any) -> None:
    """At every norm's output, averaged; in one family weighted by everything that reads the residual stream."""
    lm, data = tiny_lm(name), padded(2)
    weighted = name == "llama_tied"
    columns = torch.ones(1, 32).double()
    if weighted:
        readers = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        paths = [f"model.layers.{{}}.{reader}" for reader in readers]
        columns = torch.cat([matrix(module) for module in modules(lm, [*paths, "lm_head"])])
    norms = modules(lm, PLACES[name]["norms"])
    real = [batch["attention_mask"].flatten().bool() for batch in data]
    passes = [seen_at(lm, batch, norms, "output") for batch in data]
    of_norms = []
    for index in range(len(norms)):
        values = torch.cat([seen[index][0][kept] for seen, kept in zip(passes, real, strict=True)])
        of_norms.append([activation_score(values[:, [d]], columns[:, [d]], metric) for d in range(32)])
    scores = fitted(lm, ActivationUnitSelector(**KEEP, metric=metric, weighted=weighted), data)
    torch.testing.assert_close(scores["hidden"], torch.tensor(of_norms).double().mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_activations_weighed_by_ranges(name: str) -> None:
    lm, data = tiny_lm(name), padded(2)
    plain = fitted(lm, ActivationUnitSelector(**KEEP), data)
    weighed = fitted(lm, ActivationUnitSelector(**KEEP, weighted="ranges"), data)
    for unit in UNITS:
        layers = [None] if unit == "hidden" else range(NUM_LAYERS)
        ranges = torch.stack([unit_ranges(anatomy_of(lm), unit, layer) for layer in layers])
        torch.testing.assert_close(weighed[unit], plain[unit] * ranges.reshape(plain[unit].shape))


def test_no_other_weight_than_those_there_are() -> None:
    selector = ActivationUnitSelector(channels=20, weighted="norms")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="weighted is 'norms': it must be one of ranges, true or false"):
        fit(Plain(tiny_lm("llama_tied")), [selector], batches(1), max_steps=1)


@pytest.mark.parametrize("accumulate", ["squared", "absolute"])
@pytest.mark.parametrize("name", NAMES)
def test_taylor_is_activation_times_gradient(name: str, accumulate: Any) -> None:
    lm, data = tiny_lm(name), padded(2)
    places = PLACES[name]
    layers = {unit: modules(lm, places[unit]) for unit in ("heads", "channels")}
    writers = [*modules(lm, places["written"]), *layers["heads"], *layers["channels"]]

    def changes(batch: Batch, sites: list[nn.Module], place: str) -> Tensor:
        """Activation times gradient, summed over the tokens that are not padding, at each site [S, m]."""
        # The last padding token in front of a sequence has a loss: it predicts the first token.
        real = batch["attention_mask"].flatten().bool()
        seen = seen_at(lm, batch, sites, place, backward=True)
        # GPT-2 embeds positions once for all sequences.
        return torch.stack([((x * g)[real] if len(x) == len(real) else x * g).sum(0) for x, g in seen])

    batches_of: dict[Unit, list[Tensor]] = {
        "heads": [changes(b, layers["heads"], "input").unflatten(1, (-1, HEAD_DIM)).sum(2) for b in data],
        "channels": [changes(b, layers["channels"], "input") for b in data],
        "hidden": [changes(b, writers, "output").sum(0) for b in data],
    }
    terms = {unit: torch.stack(of_unit) for unit, of_unit in batches_of.items()}
    expected = {unit: (t.square() if accumulate == "squared" else t.abs()).mean(0) for unit, t in terms.items()}
    lm.zero_grad()
    scores = fitted(lm, TaylorUnitSelector(**KEEP, accumulate=accumulate), data)
    for unit in UNITS:
        torch.testing.assert_close(scores[unit], expected[unit], rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("kind", [ActivationUnitSelector, TaylorUnitSelector])
def test_a_mask_says_whether_and_not_how_much(kind: Any) -> None:
    """Packed sequences may be told apart by other numbers than 1."""
    lm, data = tiny_lm(), batches(2)
    numbered = [{**batch, "attention_mask": batch["attention_mask"] * 5} for batch in data]
    for batch in data + numbered:
        batch["attention_mask"][0, :3] = 0
    expected, found = (fitted(lm, kind(**KEEP), given) for given in (data, numbered))
    for unit in expected:
        torch.testing.assert_close(found[unit], expected[unit], rtol=0, atol=0)


def test_taylor_is_the_slope_of_the_loss_in_a_gate() -> None:
    """Finite differences in double precision: a channel, a head and a hidden dimension scaled by 1 + h and 1 - h."""
    lm, (batch,) = tiny_lm("llama_tied").double(), batches(1)
    layer, h = lm.model.layers[2], 1e-2
    places: dict[Unit, tuple[list[nn.Module], str, slice]] = {
        "channels": ([layer.mlp.down_proj], "input", slice(7, 8)),
        "heads": ([layer.self_attn.o_proj], "input", slice(8, 16)),
        "hidden": (
            [lm.model.embed_tokens, *modules(lm, LLAMA["heads"]), *modules(lm, LLAMA["channels"])],
            "output",
            slice(3, 4),
        ),
    }

    def loss(sites: list[nn.Module], place: str, columns: slice, gate: float) -> float:
        def scaled(values: Tensor) -> Tensor:
            factors = torch.ones(values.shape[-1], dtype=values.dtype)
            factors[columns] = gate
            return values * factors

        handles = [
            site.register_forward_pre_hook(lambda m, i: (scaled(i[0]),))
            if place == "input"
            else site.register_forward_hook(lambda m, i, o: scaled(o))
            for site in sites
        ]
        with torch.no_grad():
            logits = lm(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            value = float(nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten()))
        for handle in handles:
            handle.remove()
        return value

    slopes = {unit: (loss(*where, 1 + h) - loss(*where, 1 - h)) / (2 * h) for unit, where in places.items()}
    scores = fitted(lm, TaylorUnitSelector(**KEEP, accumulate="absolute"), [batch] * 2)
    found = {"channels": scores["channels"][2, 7], "heads": scores["heads"][2, 1], "hidden": scores["hidden"][3]}
    assert {unit: float(score) for unit, score in found.items()} == pytest.approx(
        {unit: abs(slope) for unit, slope in slopes.items()}, rel=2e-2
    )


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_magnitudes_are_the_norms_of_coupled_groups(norm: Any) -> None:
    lm = tiny_lm("llama_tied")
    anatomy = anatomy_of(lm)
    selector = MagnitudeUnitSelector(heads=2, kv_groups=1, channels=24, hidden=16, norm=norm)
    scores: dict[str, Tensor] = {}
    fit(Plain(lm), [Spy(lambda *_: scores.update(selector.scores()), "on_train_start"), selector], batches(1), 1)
    assert set(scores) == {"heads", "kv_groups", "channels", "hidden"}
    lm = tiny_lm("llama_tied")
    anatomy = anatomy_of(lm)
    torch.testing.assert_close(scores.pop("hidden"), unit_norms(anatomy, "hidden", None, norm))
    for unit, values in scores.items():
        expected = torch.stack([unit_norms(anatomy, unit, layer, norm) for layer in range(NUM_LAYERS)])
        torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_unit_of_every_family_is_seen(name: str) -> None:
    """Nothing goes here: what a family can lose is another matter."""
    counts = {"heads": 4} if name in ("mixtral", "qwen3_moe") else {"heads": 4, "channels": 48, "hidden": 32}
    for kind in (ActivationUnitSelector, TaylorUnitSelector):
        selector = kind(**counts, stop=1)
        spy = Spy(lambda *_, selector=selector: selector.scores())
        fit(Plain(tiny_lm(name, num_layers=2)), [spy, selector], padded(1), max_steps=1)
        for unit, scores in spy.seen[0].items():
            assert scores.shape == ((32,) if unit == "hidden" else (2, counts[unit]))
            assert scores.isfinite().all()
            assert (scores > 0).float().mean() > 0.8  # a ReLU may leave a channel silent


# The settings of a run that must not change what is seen.


def every_selector() -> list[UnitSelector]:
    return [
        ActivationUnitSelector(**KEEP, metric="mean"),
        ActivationUnitSelector(**KEEP, metric="fluctuation"),
        TaylorUnitSelector(**KEEP),
    ]


def assert_scores(
    left: Mapping[Unit, Tensor], right: Mapping[Unit, Tensor], rtol: float = 1e-5, factor: float = 1.0
) -> None:
    assert left.keys() == right.keys() == set(UNITS)
    for unit in UNITS:
        scale = right[unit].abs().max()
        torch.testing.assert_close(left[unit], factor * right[unit], rtol=rtol, atol=rtol * float(scale))


@pytest.mark.parametrize("index", range(3))
def test_accumulation_shows_every_batch(index: int) -> None:
    """Two steps of two batches; Taylor's loss is halved, its square quartered."""
    data = padded(4)
    selectors = [every_selector()[index] for _ in range(2)]
    selectors[1].stop = 4
    accumulated = fitted(tiny_lm(), selectors[0], data, accumulate_grad_batches=2)
    spy = Spy(lambda *_: selectors[1].scores())
    fit(Plain(), [spy, selectors[1]], data, max_steps=4)
    assert_scores(accumulated, spy.seen[-1], factor=0.25 if index == 2 else 1.0)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("index", range(3))
def test_gradient_checkpointing_changes_nothing(index: int, reentrant: bool) -> None:
    lm = tiny_lm()
    lm.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed = fitted(lm, every_selector()[index], padded(2))
    assert_scores(checkpointed, fitted(tiny_lm(), every_selector()[index], padded(2)))


def test_reentrant_checkpointing_gives_gates_gradients_though_no_weight_wants_any() -> None:
    lm = tiny_lm()
    lm.gradient_checkpointing_enable({"use_reentrant": True})
    checkpointed, stock = (
        fitted(model, TaylorUnitSelector(channels=16, stop=2), padded(2))["channels"] for model in (lm, tiny_lm())
    )
    torch.testing.assert_close(checkpointed, stock)


class Sampler(Plain):
    """Runs the LM on the side in every step, on other tokens and without gradients."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        with torch.no_grad():
            self.lm(input_ids=batch["input_ids"].flip(1))
        return loss


@pytest.mark.parametrize("index", range(3))
def test_neither_validation_nor_what_a_module_runs_on_the_side_is_scored(index: int) -> None:
    selector, data = every_selector()[index], padded(2)
    spy = Spy(lambda *_: selector.scores())
    fit(Sampler(), [spy, selector], data, max_steps=2, val_check_interval=1)
    assert_scores(spy.seen[-1], fitted(tiny_lm(), every_selector()[index], data))


@pytest.mark.parametrize("index", range(3))
def test_bf16_mixed_is_close(index: int) -> None:
    half = fitted(tiny_lm(), every_selector()[index], padded(2), precision="bf16-mixed")
    assert_scores(half, fitted(tiny_lm(), every_selector()[index], padded(2)), rtol=0.1)


def fp16(**scaler: Any) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **scaler))


def test_a_loss_scale_is_taken_out_of_taylor() -> None:
    scaled = fitted(tiny_lm(), TaylorUnitSelector(**KEEP), padded(2), plugins=[fp16(init_scale=256.0)])
    plain = fitted(tiny_lm(), TaylorUnitSelector(**KEEP), padded(2), plugins=[fp16(enabled=False)])
    assert_scores(scaled, plain, rtol=2e-2)


def test_an_overflow_is_left_out_of_taylor_and_lowers_the_scale() -> None:
    plugin = fp16(init_scale=2.0**30)
    selector = TaylorUnitSelector(**(KEEP | {"stop": 24}))
    spy = Spy(lambda *_: (plugin.scaler.get_scale(), selector.scores_state()["sums"]["hidden"][0, 0, 0].item()))
    fit(Plain(), [spy, selector], padded(1), max_steps=24, plugins=[plugin])
    scales, counted = zip(*spy.seen, strict=True)
    overflows = sum(scale < before for before, scale in zip((2.0**30, *scales), scales, strict=False))
    assert 0 < overflows < 24
    assert scales[-1] == 2.0 ** (30 - overflows)
    assert counted[-1] == 24 - overflows
    assert selector.plan is not None


class Silent(Plain):
    """A module whose loss does not come from the LM."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.lm.lm_head.weight.sum()


def test_a_window_that_shows_nothing_is_an_error() -> None:
    for selector in every_selector():
        with pytest.raises(ConfigError, match=f"{type(selector).__name__} has seen nothing by step 2"):
            fit(Silent(), [selector], padded(2), max_steps=2)


def test_hooks_are_gone_once_the_window_closes() -> None:
    def hooks(lm: nn.Module) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.modules())

    for selector in every_selector():
        spy = Spy(lambda trainer, module: hooks(module.lm), "on_train_batch_start")
        fit(Plain(), [spy, selector], padded(2), max_steps=4)
        assert spy.seen[1] > spy.seen[0]
        assert spy.seen[3] == spy.seen[0]
