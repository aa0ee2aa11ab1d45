"""Second names for parts of the language model in the user's module, and which of them a cut would leave behind.

A cut edits the list of layers in place and puts smaller parameters into the same modules. So another name for the list,
for a module that stays, or for what contains them all, is good after the cut too. Not so a name for a layer that goes,
for a parameter that is replaced, or a module that another network computes with.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lightprune.anatomy import Anatomy, Structure, Weight
from lightprune.anatomy.axes import length
from lightprune.errors import ConfigError
from lightprune.integrations.torch_modules import parts_of
from lightprune.integrations.zero_params import whole_shape

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_REGISTRIES = ("_modules", "_parameters", "_buffers")
# How deep plain lists and dictionaries are searched, and up to what length: a longer one is data.
_DEPTH, _LENGTH = 3, 10_000


@dataclass(frozen=True)
class Alias:
    """A part of the LM under a name outside the LM, or under a second one in it.

    Attributes:
        path: the name, from the user's module on.
        part: the module or the parameter.
        network: what computes with it, with its path; None where only the user's module or a container holds it.
        registered: whether the state dict has it under this name; what a plain list holds, it has not.
    """

    path: str
    part: nn.Module | nn.Parameter
    network: tuple[str, nn.Module] | None = None
    registered: bool = True


def check_aliases(module: nn.Module, anatomy: Anatomy, layers: Collection[int], units: Collection[Structure]) -> None:
    """Refuse second names for what a cut removes or replaces.

    Args:
        module: what holds the causal LM.
        anatomy: of the LM.
        layers: the indices of those that may go.
        units: the structures, other than layers, of which something will go.

    Raises:
        ConfigError: there is one, and the cut would leave something else under it than in the LM.
    """
    names: dict[int, str] = {id(part): name for name, part in anatomy.lm.named_modules()}
    names |= {id(parameter): name for name, parameter in anatomy.lm.named_parameters()}
    of_layer = layer_by_part(anatomy)
    weights = list(sliced_weights(anatomy, units))
    for alias in Search(module, anatomy).aliases():
        said = f"{alias.path} is the LM's {names[id(alias.part)]}"
        if layers:
            _check_depth(alias, said, anatomy, of_layer.get(id(alias.part)), layers)
        if weights:
            _check_width(alias, said, anatomy, weights, units)


class Search:
    """Looks for second names.

    Args:
        module: where.
        anatomy: of the LM whose parts are looked for.
    """

    def __init__(self, module: nn.Module, anatomy: Anatomy) -> None:
        self._root = module
        self._anatomy = anatomy
        self._inside = {id(child) for child in anatomy.lm.modules()}
        self._weights = {id(parameter) for parameter in anatomy.lm.parameters()}
        self._seen: set[int] = set()

    def aliases(self) -> Iterator[Alias]:
        """All of them."""
        yield from self._of(self._root, "", None)
        yield from self._within_the_lm()

    def _of(self, owner: nn.Module, path: str, network: tuple[str, nn.Module] | None) -> Iterator[Alias]:
        if id(owner) in self._seen:
            return
        self._seen.add(id(owner))
        for name, part in parts_of(owner).items():
            yield from self._found(part, _joined(path, name), network, registered=True)
        for name, value in vars(owner).items():
            if name not in _REGISTRIES and not name.endswith("_hooks"):
                for place, item in _held(value, _joined(path, name), _DEPTH):
                    yield from self._found(item, place, network, registered=False)

    def _found(
        self, item: Any, path: str, network: tuple[str, nn.Module] | None, *, registered: bool
    ) -> Iterator[Alias]:
        if id(item) in self._inside or id(item) in self._weights:
            yield Alias(path, item, network, registered)
        elif isinstance(item, nn.Module):
            yield from self._of(item, path, network if isinstance(item, _CONTAINERS) else network or (path, item))

    def _within_the_lm(self) -> Iterator[Alias]:
        """What lies in a layer, and is held elsewhere in the LM too."""
        layers, of_layer = self._anatomy.layers, layer_by_part(self._anatomy)
        for path, owner in self._anatomy.lm.named_modules():
            for name, part in parts_of(owner).items():
                index = of_layer.get(id(part))
                if part is not None and index is not None and owner is not layers and of_layer.get(id(owner)) != index:
                    yield Alias(_joined(path, name), part)


def layer_by_part(anatomy: Anatomy) -> dict[int, int]:
    """For each module and parameter in a layer, by its `id`, the index of the layer."""
    return {
        id(part): index
        for index, layer in enumerate(anatomy.layers)
        for part in (*layer.modules(), *layer.parameters())
    }


def _check_depth(alias: Alias, said: str, anatomy: Anatomy, index: int | None, layers: Collection[int]) -> None:
    moved = alias.part is anatomy.layers or (
        index is not None and index >= min(layers)
    )  # those behind it get another index
    if moved and alias.network is not None and isinstance(alias.network[1], PreTrainedModel):
        raise ConfigError(
            f"{said}, so a cut of layers would change {alias.network[0]} too: give {alias.network[0]} a copy of its "
            "own, made by `copy.deepcopy`."
        )
    if index not in layers or (isinstance(alias.part, nn.Parameter) and not alias.registered):
        return
    raise ConfigError(
        f"{said}, which would stay there after the cut has removed its layer from the LM: hold the LM's list "
        f"`{anatomy.family.layers}` itself, which the cut edits in place, or protect the layer by the selector's "
        "`protect_first` or `protect_last`."
    )


def _check_width(
    alias: Alias, said: str, anatomy: Anatomy, weights: Collection[Weight], units: Collection[Structure]
) -> None:
    if isinstance(alias.part, nn.Parameter):
        if any(weight.parameter is alias.part for weight in weights):
            raise ConfigError(
                f"{said}, and the cut puts a smaller parameter in its place in the LM alone: give it a parameter of "
                "its own, or leave its structure out of the selectors' counts."
            )
        return
    parts = set(alias.part.modules())
    if alias.network is None or (anatomy.layers in parts and alias.part is not anatomy.layers):
        return
    sizes = {size for weight in weights if weight.owner in parts for size in _sizes(weight, anatomy, units)}
    path, network = alias.network
    ours = set(anatomy.lm.parameters())
    if any(sizes.intersection(whole_shape(parameter)) for parameter in network.parameters() if parameter not in ours):
        raise ConfigError(
            f"{said}, and the cut would make it smaller while the rest of {path} keeps its size: give {path} a copy "
            "of its own, made by `copy.deepcopy`, or leave its structure out of the selectors' counts."
        )


def sliced_weights(anatomy: Anatomy, units: Collection[Structure]) -> Iterator[Weight]:
    """The parameters that become smaller where something of these structures goes."""
    for weight in anatomy.weights():
        if any(run.unit in units for axis in weight.axes for run in axis or ()):
            yield weight


def _sizes(weight: Weight, anatomy: Anatomy, units: Collection[Structure]) -> Iterator[int]:
    """The lengths of the dimensions that become smaller."""
    for axis in weight.axes:
        if axis is not None and any(run.unit in units for run in axis):
            yield length(axis, anatomy.shape)


def _held(value: object, path: str, depth: int) -> Iterator[tuple[str, object]]:
    """Modules and parameters in a value, or in plain containers that it is, with their paths."""
    if isinstance(value, (nn.Module, nn.Parameter)):
        yield path, value
    elif isinstance(value, (dict, list, tuple, set, frozenset)) and depth and len(value) <= _LENGTH:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _held(item, f"{path}[{key!r}]", depth - 1)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
