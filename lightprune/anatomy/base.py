"""Where the parts of a causal LM lie: a family's declaration, and that declaration bound to one model."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightprune.anatomy.axes import HIDDEN, Axis, Resize, Shape, Structure
from lightprune.integrations.zero_params import parameter_count, whole_shape

Axes = tuple[Axis | None, ...]
# What a predicate finds wrong with a shape, in words, or None.
Predicate = Callable[[Shape, PretrainedConfig], str | None]

# What modules keep of a model's counts beside their weights, under the names that transformers gives them.
STATED_COUNTS: Mapping[str, Callable[[Shape], int]] = {
    "embed_dim": lambda shape: shape.hidden,
    "hidden_size": lambda shape: shape.hidden,
    "intermediate_size": lambda shape: shape.channels,
    "num_heads": lambda shape: shape.heads,
    "num_key_value_groups": lambda shape: shape.heads_per_group,
    "num_key_value_heads": lambda shape: shape.kv_groups,
    "split_size": lambda shape: shape.hidden,
}


# The parameters that the output of a projection, or of a norm, is linear in.
LINEAR = ("weight", "bias")
LLAMA_WRITERS: Mapping[str, tuple[str, ...]] = {"self_attn.o_proj": LINEAR, "mlp.down_proj": LINEAR}


def _unchanged(layer: nn.Module, old: int, new: int) -> None:
    """Most families' layers do not depend on their own index beyond `layer_idx`."""


def _nothing(config: PretrainedConfig, resize: Resize) -> None:
    """Most families' configs say nothing more about a plan than its counts."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """The declaration of one family of Hugging Face causal LMs.

    Paths are dotted; those of `weights`, `writers` and `layer_index` start at a layer, the others at the causal LM.
    Modules that a model of the family does not have (an optional norm) are passed over.

    Attributes:
        model_types: the `config.model_type` values that share this layout.
        weights: a layer's modules, and what the axes of their weights stand for: (outputs, inputs), or (values,) for a
            norm.
        stem: the same for what lies outside the layers: embeddings (None, HIDDEN), the final norm, the head.
        writers: the modules of a layer whose outputs are added to the residual stream, and the parameters that such
            an output is linear in. Where a norm follows a projection, it is the norm.
        norm_offset: what the norms over prunable units add to their weights before they multiply by them.
        layers: the `nn.ModuleList` of decoder layers.
        channels_field: the config field that states the MLP's channels.
        head_dim_field: the config field that states the dimensions of a head; None where the family has none, and they
            are `hidden / heads`.
        predicates: what a shape must satisfy for the stock class to express it.
        per_layer_fields: config fields that hold one entry a layer, where they are set at all.
        layer_index: attributes that hold a layer's index (the KV cache's slot).
        renumber: called as `renumber(layer, old, new)` when a layer moves, for what else depends on the index.
        configure: called as `configure(config, resize)` for what else a config says that a plan changes.
        variant: chooses among declarations that share a `model_type`, by the config.
        transposed: the modules, beside `Conv1D`, that keep their matrices as (inputs, outputs).
    """

    model_types: tuple[str, ...]
    weights: Mapping[str, Axes]
    stem: Mapping[str, Axes]
    writers: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: LLAMA_WRITERS)
    norm_offset: float = 0.0
    layers: str = "model.layers"
    channels_field: str = "intermediate_size"
    head_dim_field: str | None = "head_dim"
    predicates: tuple[Predicate, ...] = ()
    per_layer_fields: tuple[str, ...] = ("layer_types",)
    layer_index: tuple[str, ...] = ("self_attn.layer_idx",)
    renumber: Callable[[nn.Module, int, int], None] = _unchanged
    configure: Callable[[PretrainedConfig, Resize], None] = _nothing
    variant: "Callable[[PretrainedConfig], Family] | None" = None
    transposed: tuple[str, ...] = ()

    @property
    def structures(self) -> frozenset[Structure]:
        """What of this family can be pruned."""
        axes = [axis for entry in (*self.weights.values(), *self.stem.values()) for axis in entry if axis]
        return frozenset({"layers", *(run.unit for axis in axes for run in axis)})

    def problems(self, shape: Shape, config: PretrainedConfig) -> list[str]:
        """Why the stock class cannot express a shape, each reason in words; none if it can."""
        found = (predicate(shape, config) for predicate in self.predicates)
        return [problem for problem in found if problem is not None]


@dataclass(frozen=True)
class Weight:
    """One parameter of the model, and what its dimensions stand for.

    Attributes:
        owner: the module that holds it.
        name: its name there.
        path: its name in the causal LM.
        layer: the index of the layer that it belongs to; None outside the layers.
        axes: what each dimension stands for; None where nothing of it can be pruned.
    """

    owner: nn.Module
    name: str
    path: str
    layer: int | None
    axes: Axes

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself, as it is now."""
        parameter = getattr(self.owner, self.name)
        assert isinstance(parameter, nn.Parameter)
        return parameter


@dataclass(frozen=True)
class Site:
    """One module of the model that has something to prune.

    Attributes:
        module: the module.
        path: its name in the causal LM.
        layer: the index of the layer that it belongs to; None outside the layers.
        axes: (outputs, inputs) of a projection, (None, HIDDEN) of an embedding or the head, (values,) of a norm.
        transposed: whether it keeps its matrix as (inputs, outputs).
    """

    module: nn.Module
    path: str
    layer: int | None
    axes: Axes
    transposed: bool = False

    @property
    def is_norm(self) -> bool:
        """Whether it normalizes over the units of a structure."""
        return len(self.axes) == 1

    @property
    def writes_hidden(self) -> bool:
        """Whether its output adds to the residual stream: a projection onto it, or an embedding."""
        if isinstance(self.module, nn.Embedding):
            return self.axes[-1] == HIDDEN
        return len(self.axes) == 2 and self.axes[0] == HIDDEN

    def reads(self, axis: Axis) -> bool:
        """Whether it is a projection that takes what the units of a structure give."""
        return len(self.axes) == 2 and self.axes[1] == axis

    def weights(self) -> Iterator[Weight]:
        """Its parameters that have something to prune."""
        for name, parameter in self.module.named_parameters(recurse=False):
            if len(whole_shape(parameter)) == 1:
                axes = self.axes[:1]
            else:
                axes = self.axes[::-1] if self.transposed else self.axes
            if any(axes):
                yield Weight(self.module, name, f"{self.path}.{name}", self.layer, axes)


@dataclass(frozen=True)
class Writer:
    """One module of a layer whose output is added to the residual stream.

    Attributes:
        module: the module.
        layer: the index of the layer that it belongs to.
        names: the parameters that its output is linear in, up to `offset`.
        offset: what the module adds to them before it multiplies by them.
    """

    module: nn.Module
    layer: int
    names: tuple[str, ...]
    offset: float


@dataclass(frozen=True)
class Anatomy:
    """A family's declaration bound to one model. Reads the model; never changes it."""

    family: Family
    lm: PreTrainedModel

    @property
    def model_type(self) -> str:
        """The `model_type` that the model's config states."""
        return str(self.lm.config.model_type)

    @property
    def config(self) -> PretrainedConfig:
        """What the model's config says of its text: one object, shared by all modules that read it."""
        return self.lm.config.get_text_config()

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order. Each takes hidden states [B, T, d] first and returns a tensor [B, T, d]."""
        layers = self.lm.get_submodule(self.family.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def decoder(self) -> nn.Module:
        """The module that runs the layers, from token ids to hidden states.

        Every pass goes through it: a module with a loss of its own may call it and the head, and never the LM.
        """
        return self.lm.get_submodule(self.family.layers.rpartition(".")[0])

    @property
    def head(self) -> nn.Module:
        """The module that makes logits of the decoder's output."""
        head: nn.Module = self.lm.get_output_embeddings()  # type: ignore[no-untyped-call]
        return head

    @property
    def num_layers(self) -> int:
        """How many decoder layers the model has now."""
        return len(self.layers)

    @property
    def shape(self) -> Shape:
        """The model's counts, as its config states them now."""
        return shape_of(self.config, self.family)

    @property
    def num_parameters(self) -> int:
        """How many parameters the model has now; tied ones count once."""
        return parameter_count(self.lm)

    def layer_of(self, name: str) -> tuple[int, str] | None:
        """The layer in which a parameter of the causal LM lies, and its name there; None outside the layers."""
        prefix = f"{self.family.layers}."
        if not name.startswith(prefix):
            return None
        index, _, rest = name.removeprefix(prefix).partition(".")
        return int(index), rest

    def sites(self) -> Iterator["Site"]:
        """Every module that has something to prune, layers in order, then the stem."""
        for index, layer in enumerate(self.layers):
            yield from self._sites(layer, self.family.weights, f"{self.family.layers}.{index}.", index)
        yield from self._sites(self.lm, self.family.stem, "", None)

    def _sites(self, root: nn.Module, table: Mapping[str, Axes], prefix: str, layer: int | None) -> Iterator["Site"]:
        for path, axes in table.items():
            module = module_at(root, path)
            if module is not None:
                transposed = isinstance(module, Conv1D) or path in self.family.transposed
                yield Site(module, prefix + path, layer, axes, transposed)

    def writers(self) -> Iterator["Writer"]:
        """Every module inside the layers that writes to the residual stream."""
        for index, layer in enumerate(self.layers):
            for path, names in self.family.writers.items():
                module = module_at(layer, path)
                if module is not None:
                    is_norm = len(self.family.weights.get(path, (None, None))) == 1
                    yield Writer(module, index, names, self.family.norm_offset if is_norm else 0.0)

    def weights(self) -> Iterator["Weight"]:
        """Every parameter that has something to prune, in the order of `sites`; a tied one comes twice."""
        for site in self.sites():
            yield from site.weights()


def shape_of(config: PretrainedConfig, family: Family) -> Shape:
    """The counts that a config states."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, family.head_dim_field, None) if family.head_dim_field else None
    channels = getattr(config, family.channels_field, None)
    return Shape(
        layers=config.num_hidden_layers,
        hidden=hidden,
        heads=heads,
        kv_groups=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim or hidden // heads,
        channels=4 * hidden if channels is None else channels,
    )


def module_at(root: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a dotted path; None if there is none."""
    module: object = root
    for name in path.split("."):
        module = getattr(module, name, None)
    return module if isinstance(module, nn.Module) else None
