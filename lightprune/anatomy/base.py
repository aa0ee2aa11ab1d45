"""Where the parts of a causal LM lie: a family's declaration, and that declaration bound to one model."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


def _unchanged(layer: nn.Module, old: int, new: int) -> None:
    """Most families' layers do not depend on their own index beyond `layer_idx`."""


@dataclass(frozen=True)
class Family:
    """The declaration of one family of Hugging Face causal LMs.

    Attributes:
        model_types: the `config.model_type` values that share this layout.
        layers: dotted path from the causal LM to the `nn.ModuleList` of its decoder layers.
        depth_field: the config field that states the number of layers.
        per_layer_fields: config fields that hold one entry a layer, where they are set at all.
        layer_index: dotted paths, from a layer, of the attributes that hold its index (the KV cache's slot).
        renumber: called as `renumber(layer, old, new)` when a layer moves, for what else depends on the index.
    """

    model_types: tuple[str, ...]
    layers: str
    depth_field: str = "num_hidden_layers"
    per_layer_fields: tuple[str, ...] = ()
    layer_index: tuple[str, ...] = ("self_attn.layer_idx",)
    renumber: Callable[[nn.Module, int, int], None] = _unchanged


@dataclass(frozen=True)
class Anatomy:
    """A family's declaration bound to one model. Reads the model; never changes it."""

    family: Family
    lm: PreTrainedModel

    @property
    def model_type(self) -> str:
        """The `model_type` that the model's config states."""
        return str(self.config.model_type)

    @property
    def config(self) -> PretrainedConfig:
        """The model's own config: one object, shared by all of its modules."""
        return self.lm.config

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order. Each takes hidden states [B, T, d] first and returns a tensor [B, T, d]."""
        layers = self.lm.get_submodule(self.family.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def num_layers(self) -> int:
        """How many decoder layers the model has now."""
        return len(self.layers)

    @property
    def num_parameters(self) -> int:
        """How many parameters the model has now; tied ones count once."""
        return sum(parameter.numel() for parameter in self.lm.parameters())

    def parameters_of_layer(self, index: int) -> int:
        """How many parameters layer `index` holds."""
        return sum(parameter.numel() for parameter in self.layers[index].parameters())
