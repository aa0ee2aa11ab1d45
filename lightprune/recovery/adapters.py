"""Low-rank adapters on the projections of a causal LM, made and merged by `peft`, and their places in optimizers."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from peft import LoraConfig, LoraModel
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from lightprune.anatomy import Anatomy
from lightprune.integrations.seeding import seed_generators
from lightprune.integrations.zero_params import gathered_for_update

# What `peft` calls an adapter that is the only one.
NAME = "default"

# For each optimizer and each of its groups, the parameters.
Groups = list[list[list[nn.Parameter]]]


class Adapters:
    """LoRA adapters (arXiv 2106.09685, section 4.1), put into a model in place; of its parameters, only they train.

    They are float32 where the weights they adapt have half precision, as `peft` makes them, and of the weights' dtype
    elsewhere.

    Args:
        anatomy: of the model.
        paths: the projections to adapt, as dotted paths that start at a layer.
        r: rank of the adapters.
        alpha: their scale is `alpha / r`, or `alpha / sqrt(r)` with `use_rslora`.
        dropout: on the input of the adapters.
        use_rslora: see `alpha`.
        seed: of the initial A; B is 0.
    """

    def __init__(
        self, anatomy: Anatomy, paths: Sequence[str], *, r: int, alpha: int, dropout: float, use_rslora: bool, seed: int
    ) -> None:
        self._lm = anatomy.lm
        self._stack = anatomy.layers
        self._own = list(self._lm.parameters())
        self._trained = [parameter for parameter in self._own if parameter.requires_grad]
        config = LoraConfig(
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            use_rslora=use_rslora,
            target_modules=rf"\d+\.({'|'.join(map(re.escape, paths))})",
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in self._stack.modules()),
        )
        with isolate_rng():
            seed_generators(seed)
            # The layers alone: to a whole mixture of experts `peft` would add adapters on parameters nobody asked for.
            self._tuner = LoraModel(self._stack, config, NAME)
        cast_adapter_dtype(self._stack, NAME)
        self._layers = {path: layer for path, layer in self._stack.named_modules() if isinstance(layer, Linear)}
        self._freeze()
        self._checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in self._lm.modules())
        if self._checkpointing:
            # A re-entrant checkpoint gives no gradients where its input has none, and the embedding is frozen.
            self._lm.enable_input_require_grads()  # type: ignore[no-untyped-call]

    @property
    def modules(self) -> list[nn.Module]:
        """What holds the adapters' parameters."""
        return [module for layer in self._layers.values() for module in (layer.lora_A, layer.lora_B)]

    @property
    def substitutes(self) -> dict[nn.Parameter, tuple[nn.Parameter, ...]]:
        """For each parameter of the model's own, what trains in its place: A [r, in] and B [out, r], or nothing."""
        pairs = {
            layer.get_base_layer().weight: (*layer.lora_A.parameters(), *layer.lora_B.parameters())
            for layer in self._layers.values()
        }
        return {parameter: pairs.get(parameter, ()) for parameter in self._own}

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """The model without them, training as it did before, for whoever asks it for its parameters."""
        self._place({path: layer.get_base_layer() for path, layer in self._layers.items()})
        self._thaw()
        try:
            yield
        finally:
            self._place(self._layers)
            self._freeze()

    @torch.no_grad()
    def merge(self) -> None:
        """Add them to the weights, W + scale * B A, and leave the plain model."""
        for layer in self._layers.values():
            with gathered_for_update(list(layer.parameters())):
                layer.merge()
        self._tuner.unload()
        self._leave()

    def remove(self) -> None:
        """Leave the plain model as it would be without them."""
        self._tuner.unload()
        self._leave()

    def _leave(self) -> None:
        vars(self._stack).pop("peft_config", None)  # what `peft` leaves behind on the list of layers
        self._thaw()
        if self._checkpointing:
            self._lm.disable_input_require_grads()  # type: ignore[no-untyped-call]

    def _freeze(self) -> None:
        for parameter in self._trained:
            parameter.requires_grad_(False)
            parameter.grad = None

    def _thaw(self) -> None:
        for parameter in self._trained:
            parameter.requires_grad_(True)

    def _place(self, modules: Mapping[str, nn.Module]) -> None:
        for path, module in modules.items():
            parent, _, name = path.rpartition(".")
            setattr(self._stack.get_submodule(parent), name, module)


def projections(anatomy: Anatomy) -> list[str]:
    """What adapters can be put on: a layer's linear projections, as dotted paths that start at a layer."""
    found = (
        path
        for layer in anatomy.layers
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    )
    return list(dict.fromkeys(found))


def substitute(optimizers: Sequence[Optimizer], substitutes: Mapping[nn.Parameter, Sequence[nn.Parameter]]) -> Groups:
    """Give the places of parameters in optimizers to others; options and number of the groups stay as they are.

    What would come for a parameter that no optimizer trains joins the first group of the first one. The state of the
    parameters that leave goes with them.

    Returns:
        The parameters of the groups as they were, for `restore`.
    """
    before = groups_of(optimizers)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [new for old in group["params"] for new in substitutes.get(old, (old,))]
            group.pop("param_names", None)  # they would be those of others
    _forget(optimizers, substitutes)
    placed = {parameter for groups in groups_of(optimizers) for group in groups for parameter in group}
    homeless = [new for news in substitutes.values() for new in news if new not in placed]
    optimizers[0].param_groups[0]["params"] += homeless
    return before


def restore(optimizers: Sequence[Optimizer], before: Groups) -> None:
    """Undo `substitute`; the parameters that come back begin without a state."""
    after = {parameter for groups in groups_of(optimizers) for group in groups for parameter in group}
    for optimizer, groups in zip(optimizers, before, strict=True):
        for group, parameters in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = parameters
    _forget(optimizers, after.difference(p for groups in before for group in groups for p in group))


def groups_of(optimizers: Sequence[Optimizer]) -> Groups:
    """The parameters of each group of each optimizer."""
    return [[list(group["params"]) for group in optimizer.param_groups] for optimizer in optimizers]


def _forget(optimizers: Sequence[Optimizer], gone: Mapping[nn.Parameter, object] | set[nn.Parameter]) -> None:
    for optimizer in optimizers:
        for parameter in gone:
            optimizer.state.pop(parameter, None)
