"""The callbacks in strangers' modules: wherever the LM is, whatever they return, however they optimize."""

import copy
import csv
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightprune import (
    BlockInfluenceSelector,
    DifferencePenalty,
    GateAnnealing,
    GreedyPerplexitySelector,
    GroupNormPenalty,
    HardConcreteSelector,
    LayerGateSelector,
    Pipeline,
    PlanFromFile,
    PruningPlan,
    RandomSelector,
    RandomUnitSelector,
    Recovery,
    StructuredCut,
    TaylorUnitSelector,
)
from lightprune.anatomy import anatomy_of
from lightprune.integrations.lightning import find_causal_lm
from tests.families import tiny_lm
from tests.test_bad_input import attached
from tests.training import (
    Batch,
    Batches,
    Plain,
    Spy,
    assert_close,
    assert_equal,
    batches,
    fit,
    gradients,
    trainer_for,
    weights,
)

SELECT, CUT, STEPS = 4, 7, 9


def everything() -> list[Callback]:
    return [
        StructuredCut(at=CUT),
        LayerGateSelector(drop=2, steps_per_round=SELECT // 2, l1=0.02),
        DifferencePenalty(strength=0.1),
        GateAnnealing(),
        Recovery(lr=1e-2, warmup_steps=1),
    ]


def run(module: L.LightningModule, **kwargs: Any) -> dict[str, Tensor]:
    """The LM's weights after a run through all phases; checks that it was cut, trained on and left alone."""
    cut, *others = everything()
    last = Spy(lambda trainer, m: weights(find_causal_lm(m)[1]), "on_train_batch_start")
    with torch.random.fork_rng():
        trainer = fit(module, [last, *others, cut], batches(STEPS), max_steps=STEPS, **kwargs)
    assert trainer.global_step == STEPS
    assert isinstance(cut, StructuredCut)
    assert cut.done
    lm = find_causal_lm(module)[1]
    assert lm.config.num_hidden_layers == len(anatomy_of(lm).layers) == 4
    optimized = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
    assert {id(p) for p in lm.parameters()} <= optimized
    after = weights(lm)
    assert all(not torch.equal(after[name], last.seen[-1][name]) for name in after)
    assert pristine(module)
    return after


def pristine(module: nn.Module) -> bool:
    """No hooks, no shadowed methods: as a module and an LM of which no callback ever knew."""
    hooks = [value for child in module.modules() for key, value in vars(child).items() if key.endswith("_hooks")]
    shadows = [
        name
        for child in module.modules()
        for name in vars(child)
        if name
        in ("forward", "configure_model", "configure_optimizers", "training_step", "backward", "manual_backward")
    ]
    return not any(hooks) and not shadows


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return run(Plain())


# Where the LM is.


class Late(Plain):
    def __init__(self) -> None:
        super().__init__()
        del self.lm

    def configure_model(self) -> None:
        if "lm" not in self._modules:
            self.lm = tiny_lm()


class InSetup(Late):
    """Builds the LM in `setup`, and configures nothing later."""

    def setup(self, stage: str) -> None:
        super().configure_model()

    def configure_model(self) -> None:
        pass


class AsTuples(Plain):
    """Asks the LM for tuples."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.lm(**batch, use_cache=False, return_dict=False)[0]


class Deep(Plain):
    def __init__(self) -> None:
        super().__init__()
        inner = nn.Module()
        inner.add_module("policy", self.lm)
        del self.lm
        self.agents = nn.ModuleDict({"first": nn.ModuleList([inner])})

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.agents["first"][0].policy(**batch, use_cache=False).loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("loss", self.training_step(batch, batch_idx))


class WithTeacher(Plain):
    """Two LMs, and a word on which of them to prune."""

    pruned_model = "lm"

    def __init__(self) -> None:
        super().__init__()
        self.teacher = tiny_lm(seed=5).eval().requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.lm.parameters(), lr=0.05)


class OwnLoss(Plain):
    """Calls the LM with positional arguments and no labels, and makes the loss itself."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self.lm(batch["input_ids"], batch["attention_mask"]).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


class InADict(Plain):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "note": "not a tensor"}


@pytest.mark.parametrize("module", [Late, InSetup, Deep, WithTeacher, InADict, AsTuples])
def test_wherever_the_lm_is(module: type[Plain], reference: dict[str, Tensor]) -> None:
    assert_equal(run(module()), reference)


def test_positional_arguments_no_labels_and_a_cache(reference: dict[str, Tensor]) -> None:
    assert_close(run(OwnLoss()), reference, rtol=1e-3, atol=1e-5)


def test_frozen_layers_stay_frozen_and_as_they_are() -> None:
    """Through every phase; with a filter on what trains, and without."""
    ends = []
    for filtered in (True, False):

        def optimizer(parameters: Any, filtered: bool = filtered) -> Any:
            return torch.optim.SGD([p for p in parameters if p.requires_grad or not filtered], lr=0.05)

        module = Plain(optimizer=optimizer)
        frozen = [*module.lm.model.embed_tokens.parameters(), *module.lm.model.layers[0].parameters()]
        for parameter in frozen:
            parameter.requires_grad_(False)
        before = [parameter.clone() for parameter in frozen]
        cut, *others = everything()
        with torch.random.fork_rng():
            fit(module, [*others, cut], batches(STEPS), STEPS)
        assert cut.plan is not None
        assert all(torch.equal(old, new) for old, new in zip(before, frozen, strict=True))
        assert not any(parameter.requires_grad for parameter in frozen)
        ends.append(weights(module))
    assert_equal(*ends)


FROZEN: dict[str, Callable[[], list[Callback]]] = {
    "difference": lambda: [RandomSelector(drop=3), DifferencePenalty()],
    "annealing": lambda: [RandomSelector(drop=3), GateAnnealing()],
    "group norms": lambda: [RandomUnitSelector(channels=32), GroupNormPenalty()],
    "gates beside weights": lambda: [LayerGateSelector(drop=2, steps_per_round=2, hold_weights=False)],
    "masks": lambda: [HardConcreteSelector(layers=4, stop=3)],
    "taylor": lambda: [TaylorUnitSelector(channels=32, stop=2)],
}


@pytest.mark.parametrize("parts", FROZEN)
def test_frozen_layers(parts: str, tmp_path: Any) -> None:
    """Of those that go and of those that stay: they do not move, and those above learn."""
    module, cut = Plain(), StructuredCut(at=4)
    layers = list(anatomy_of(module.lm).layers)
    for layer in layers[:3]:
        layer.requires_grad_(False)
    before = [weights(layer) for layer in layers]
    moved = Spy(lambda *_: [weights(layer) for layer in layers], "on_validation_start")
    fit(module, [moved, *FROZEN[parts](), cut], batches(6), max_steps=6, default_root_dir=tmp_path)
    assert cut.done
    uncut = moved.seen[0]  # the validation before the cut
    for index in range(3):
        assert_equal(uncut[index], before[index])
    assert any(not torch.equal(uncut[5][name], before[5][name]) for name in before[5])
    assert {parameter.requires_grad for parameter in module.lm.parameters()} == {True, False}


# What configure_optimizers returns.


def cosine(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)


FORMS: dict[str, tuple[bool, Callable[[Any], Any]]] = {
    "optimizer": (False, lambda o: o),
    "list": (False, lambda o: [o]),
    "tuple": (False, lambda o: (o,)),
    "dict": (False, lambda o: {"optimizer": o}),
    "two lists": (True, lambda o: ([o], [{"scheduler": cosine(o), "interval": "step"}])),
    "a tuple of lists, the second one empty": (False, lambda o: ([o], [])),
    "dict with a scheduler's config": (
        True, lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": cosine(o), "interval": "step"}},
    ),
    "tuple of one dict": (
        True, lambda o: ({"optimizer": o, "lr_scheduler": {"scheduler": cosine(o), "interval": "step"}},),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_configure_optimizers(form: str, reference: dict[str, Tensor]) -> None:
    scheduled, wrap = FORMS[form]

    class Stranger(Plain):
        def configure_optimizers(self) -> Any:
            return wrap(torch.optim.SGD(self.parameters(), lr=0.05))

    expected = reference
    if scheduled:
        expected = run(Plain(scheduler=cosine))
        assert any(not torch.equal(expected[name], reference[name]) for name in reference)
    assert_equal(run(Stranger()), expected)


def test_scheduler_by_epoch_without_a_config() -> None:
    class Stranger(Plain):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}

    run(Stranger())


def test_plateau_scheduler() -> None:
    class Stranger(Plain):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss"}}

    run(Stranger())


def test_filter_on_requires_grad_sees_all_weights(reference: dict[str, Tensor]) -> None:
    """Held weights are held after the optimizers are configured, so that this common filter keeps them."""

    class Stranger(Plain):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)

    assert_equal(run(Stranger()), reference)


def test_two_checkpoints_and_a_monitor_of_the_rate_beside_it(tmp_path: Any) -> None:
    """The best of each and the rate at every step, as without pruning."""
    savers = [
        ModelCheckpoint(tmp_path / "steps", "{step}", every_n_train_steps=3, save_top_k=-1),
        ModelCheckpoint(tmp_path / "best", "{step}", monitor="val/loss", save_last=True),
    ]
    logger = CSVLogger(tmp_path)
    parts = [*savers, LearningRateMonitor("step"), *everything()[:-1]]
    fit(
        Plain(scheduler=cosine), parts, batches(STEPS), STEPS, logger=logger, enable_checkpointing=True,
        log_every_n_steps=1,
    )  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "steps").iterdir()) == ["step=3.ckpt", "step=6.ckpt", "step=9.ckpt"]
    assert (tmp_path / "best" / "last.ckpt").exists()
    logger.save()
    with open(logger.experiment.metrics_file_path) as file:
        rows = list(csv.DictReader(file))
    rates = [float(row["lr-SGD"]) for row in rows if row.get("lr-SGD")]
    assert len(rates) == STEPS
    assert rates == sorted(rates, reverse=True)


# Manual optimization.


class Manual(Plain):
    def __init__(self, lm: Any = None) -> None:
        super().__init__(lm)
        self.automatic_optimization = False

    def loss(self, batch: Batch) -> Tensor:
        return self.lm(**batch, use_cache=False).loss

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Saved(Manual):
    """The last operation of the loss saves its output: adding to that in place would be an error."""

    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch).log().exp()


class Closure(Manual):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


@pytest.mark.parametrize("module", [Manual, Closure])
def test_manual_optimization_is_automatic_optimization(module: type[Manual], reference: dict[str, Tensor]) -> None:
    assert_equal(run(module()), reference)


@pytest.mark.parametrize("module", [Manual, Saved, Closure])
def test_penalty_reaches_the_gradient_exactly_under_manual_optimization(module: type[Manual], tmp_path: Any) -> None:
    lm, batch = tiny_lm(), batches(1)[0]
    twin = copy.deepcopy(lm)
    states: list[tuple[Tensor, Tensor]] = []
    anatomy_of(twin).layers[2].register_forward_hook(lambda m, i, o: states.append((i[0], o)))
    loss = twin(**batch, use_cache=False).loss
    difference = states[0][1] - states[0][0]
    (loss + 3.0 * (difference.norm(dim=-1) / difference.shape[-1] ** 0.5).mean()).backward()
    PruningPlan.dropping(anatomy_of(lm), [2]).save(tmp_path / "plan.json")
    stranger = module(lm)
    spy = Spy(lambda trainer, m: gradients(m.lm), "on_before_optimizer_step")
    fit(
        stranger,
        [spy, PlanFromFile(str(tmp_path / "plan.json")), DifferencePenalty(3.0, relative=False, stop=3)],
        [batch],
        1,
    )
    assert_close(spy.seen[0], gradients(twin), rtol=1e-4, atol=1e-6)


def test_two_optimizers_one_of_which_has_nothing_to_do_with_the_lm(reference: dict[str, Tensor]) -> None:
    class Two(Manual):
        def __init__(self) -> None:
            super().__init__()
            self.probe = nn.Linear(2, 2)

        def training_step(self, batch: Batch, batch_idx: int) -> None:
            ours, _ = self.optimizers()
            ours.zero_grad()
            self.manual_backward(self.loss(batch))
            ours.step()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.lm.parameters(), lr=0.05), torch.optim.SGD(self.probe.parameters(), lr=0.05)

    assert_equal(run(Two()), reference)


@pytest.mark.parametrize("hold_weights", [True, False])
def test_rounds_of_gates_where_a_batch_has_two_optimizer_steps(hold_weights: bool) -> None:
    class Twice(Manual):
        def training_step(self, batch: Batch, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            super().training_step(batch, batch_idx)

    selector = LayerGateSelector(drop=2, steps_per_round=5, hold_weights=hold_weights)
    fit(Twice(), [selector, StructuredCut(at=12)], batches(8), 14)
    assert selector.plan is not None
    assert [found["steps"] for found in selector.plan.provenance["rounds"]] == [5, 5]


class Auxiliary(Manual):
    """A second loss, of its own, beside the LM's one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.probe = nn.Linear(2, 1)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.manual_backward(self.probe(torch.ones(2)).sum())
        optimizer.step()


class Halves(Manual):
    """Two passes of half a batch, each with its own backward call."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for half in range(2):
            self.manual_backward(self.loss({name: value[half::2] for name, value in batch.items()}) / 2)
        optimizer.step()


def gates_gradient(module: Manual, l1: float) -> Tensor:
    selector = LayerGateSelector(drop=1, steps_per_round=2, l1=l1, hold_weights=False)
    spy = Spy(lambda *_: selector._gates.grad.clone(), "on_before_optimizer_step")
    fit(module, [spy, selector], batches(1), 1)
    return spy.seen[0]


def test_two_backward_calls_for_one_forward_pass_get_one_penalty(reference: dict[str, Tensor]) -> None:
    assert torch.equal(gates_gradient(Auxiliary(), 0.1), gates_gradient(Manual(), 0.1))
    assert_equal(run(Auxiliary()), reference)


def test_two_forward_passes_get_two_penalties() -> None:
    torch.testing.assert_close(gates_gradient(Halves(), 0.1), gates_gradient(Manual(), 0.2), rtol=1e-4, atol=1e-5)


# Passes on the side.


class Scores(Plain):
    """Scores other text without gradients, before and after the pass that trains."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.score()
        loss = super().training_step(batch, batch_idx)
        self.score()
        return loss

    @torch.no_grad()
    def score(self) -> None:
        for batch in batches(2, seed=900):
            self.lm(**batch, use_cache=False)


def test_a_pass_without_gradients_does_not_dilute_the_penalty(reference: dict[str, Tensor]) -> None:
    assert_equal(run(Scores()), reference)


@pytest.mark.parametrize("make", [BlockInfluenceSelector, GreedyPerplexitySelector])
def test_a_pass_without_gradients_is_not_scored(make: Any) -> None:
    plans = []
    for module in (Plain(), Scores()):
        selector = make(drop=2, stop=2)
        fit(module, [selector], batches(2), 2)
        plans.append(selector.plan)
    assert plans[0] is not None
    assert plans[0] == plans[1]


# Precision.


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true"])
def test_precisions(precision: Any, reference: dict[str, Tensor]) -> None:
    class InPlace(Plain):
        def __init__(self) -> None:
            super().__init__(optimizer=lambda p: torch.optim.SGD(p, lr=1e-2))

    module = InPlace()
    cut, *others = everything()
    trainer = fit(module, [cut, *others], batches(STEPS), max_steps=STEPS, precision=precision)
    assert trainer.global_step == STEPS
    assert isinstance(cut, StructuredCut)
    assert cut.metrics["after"]["val/loss"] == pytest.approx(cut.metrics["before"]["val/loss"], rel=2e-2)
    dtype = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}[precision]
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert all(p.isfinite().all() for p in module.parameters())
    assert pristine(module)


# Traces.


def test_a_module_wrapped_by_its_owner_gets_its_own_wrapper_back() -> None:
    module = Plain()
    calls: list[str] = []
    module.configure_model = lambda: calls.append("mine")  # type: ignore[method-assign]
    mine = module.configure_model
    trainer_for([RandomSelector(drop=1), StructuredCut(at=1)], 2).fit(module, batches(2), batches(1))
    assert calls == ["mine"]
    assert module.configure_model is mine


def test_validate_and_test_leave_no_trace_and_do_not_cut() -> None:
    class Tested(Plain):
        def test_step(self, batch: Batch, batch_idx: int) -> None:
            self.validation_step(batch, batch_idx)

    module = Tested()
    shape = [attached(child) for child in module.modules()]
    before = weights(module)
    for verb in ("validate", "test"):
        trainer = trainer_for([BlockInfluenceSelector(drop=1), GateAnnealing(), StructuredCut(at=3)], 5)
        getattr(trainer, verb)(module, batches(2))
        assert [attached(child) for child in module.modules()] == shape
    assert_equal(weights(module), before)


def test_a_cut_checkpoint_validates_in_an_uncut_module(tmp_path: Any) -> None:
    """`trainer.validate(ckpt_path=...)`, with the callbacks, gives the cut model its shape before its weights load."""
    cut = StructuredCut(at=2)
    parts = [RandomSelector(drop=2), cut]
    trainer = fit(Plain(), parts, batches(4), 4)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    expected = trainer.validate(trainer.lightning_module, batches(1), verbose=False)
    module = Plain()
    again = trainer_for([RandomSelector(drop=2), StructuredCut(at=2)], 4)
    actual = again.validate(module, batches(1), ckpt_path=tmp_path / "cut.ckpt", verbose=False, weights_only=True)
    assert actual == expected
    assert module.lm.config.num_hidden_layers == 4


@pytest.mark.parametrize(
    "parts",
    [
        lambda: [RandomSelector(drop=2), GateAnnealing()],
        lambda: [RandomUnitSelector(channels=32, hidden=24), GateAnnealing()],
        lambda: [LayerGateSelector(drop=2, steps_per_round=3)],
        lambda: [HardConcreteSelector(channels=32, stop=5)],
    ],
    ids=["annealed layers", "annealed units", "gates", "masks"],
)
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_a_checkpoint_is_evaluated_as_it_was_saved(parts: Any, stage: str, tmp_path: Any) -> None:
    """With the gates and masks that the model had when the metric was logged by which the checkpoint was chosen."""

    class Tested(Plain):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.validation_step(batch, batch_idx)

    saver = ModelCheckpoint(tmp_path, "{step}", monitor="val/loss", save_top_k=-1)
    fit(
        Plain(optimizer=lambda p: torch.optim.SGD(p, lr=1.0)),
        [*parts(), StructuredCut(at=7, validate=False), saver],
        batches(8),
        8,
        val_check_interval=4,
        enable_checkpointing=True,
        default_root_dir=tmp_path,
    )
    for path, logged in saver.best_k_models.items():
        trainer = trainer_for([*parts(), StructuredCut(at=7)], 8, default_root_dir=tmp_path)
        module = Tested()
        (found,) = getattr(trainer, stage)(module, batches(1), ckpt_path=path, verbose=False, weights_only=True)
        assert found["val/loss"] == pytest.approx(logged.item(), rel=1e-6), path
        assert not [child for child in module.modules() if child._forward_hooks or child._forward_pre_hooks]
    assert len(saver.best_k_models) == 2


@pytest.mark.parametrize(
    "parts",
    [
        lambda: [LayerGateSelector(drop=2, rounds=2, steps_per_round=2), GateAnnealing()],
        lambda: [HardConcreteSelector(channels=32, stop=16)],
        lambda: [HardConcreteSelector(channels=32, stop=6)],
    ],
    ids=["gates", "masks", "masks, decided"],
)
def test_a_checkpoint_of_a_run_without_pruning_is_evaluated_without(parts: Any, tmp_path: Any) -> None:
    trainer = fit(Plain(), [], batches(8), 8)
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    expected = trainer.validate(trainer.lightning_module, batches(1), verbose=False)
    again = trainer_for([*parts(), StructuredCut(at=18)], 20)
    found = again.validate(Plain(), batches(1), ckpt_path=tmp_path / "dense.ckpt", verbose=False, weights_only=True)
    assert found == expected


@pytest.mark.parametrize("module", [Plain, Late])
@pytest.mark.parametrize("at", [2, CUT + 1])
def test_a_new_trainer_goes_on_from_a_checkpoint(
    module: type[Plain], at: int, reference: dict[str, Tensor], tmp_path: Any
) -> None:
    """Wherever the LM is built, it has the checkpoint's shape before the weights load."""
    data = batches(STEPS)
    first = fit(module(), [StopAt(at), *everything()], data, STEPS)
    assert first.global_step == at
    first.save_checkpoint(tmp_path / "some.ckpt")
    again = module()
    trainer = trainer_for(everything(), STEPS)
    trainer.fit(again, Rest(data, at), data[:1], ckpt_path=tmp_path / "some.ckpt", weights_only=True)
    assert_equal(weights(find_causal_lm(again)[1]), reference)
    assert pristine(again)


class Rest(Batches):
    """A loader of all batches that stands after the first few."""

    def __init__(self, data: Batches, consumed: int) -> None:
        super().__init__(data)
        self.consumed = consumed

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.data[self.consumed :])


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step == self.step


def test_fitting_on_after_the_cut_goes_on_with_the_cut_model() -> None:
    """A second `fit` of the same trainer: nothing is selected, emptied or cut again."""
    module = Plain()
    cut, *others = everything()
    trainer = fit(module, [cut, *others], batches(STEPS), STEPS)
    first = weights(module)
    trainer.fit_loop.epoch_loop.max_steps = STEPS + 2
    trainer.fit(module, batches(4), batches(1))
    assert trainer.global_step == STEPS + 2
    assert module.lm.config.num_hidden_layers == 4
    assert weights(module).keys() == first.keys()
    assert all(not torch.equal(value, first[name]) for name, value in weights(module).items())
    assert pristine(module)


def test_no_callbacks_no_pipeline() -> None:
    trainer = fit(Plain(), [], batches(1), 1)
    assert Pipeline.of(trainer) is None


def test_nothing_keeps_a_finished_run_alive() -> None:
    def dropped() -> weakref.ref[nn.Module]:
        module = Plain()
        fit(module, everything(), batches(STEPS), STEPS)
        return weakref.ref(module)

    module = dropped()
    gc.collect()
    assert module() is None
