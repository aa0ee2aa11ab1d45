"""What no cut can handle in the user's module: found when the module is bound, and refused before anything trains."""

from collections.abc import Collection

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel

from lightprune.anatomy import Anatomy, Structure
from lightprune.errors import ConfigError
from lightprune.integrations.torch_modules import gradient_hooks, is_compiled
from lightprune.integrations.zero_params import gathered, whole_shape
from lightprune.pipeline.aliases import check_aliases, sliced_weights


def check_eager(module: nn.Module, lm: nn.Module) -> None:
    """Refuse an LM that is compiled, in whole or in part: gates and penalties that attach later would not be compiled.

    Raises:
        ConfigError: the LM, something in it, or something around it went through `torch.compile`.
    """
    inside = set(lm.modules())
    for name, child in module.named_modules():
        if is_compiled(child) and not inside.isdisjoint(child.modules()):
            raise ConfigError(
                f"{name or type(module).__name__} is compiled, and gates and penalties cannot join compiled code: "
                "leave `torch.compile` out of a run that prunes, and compile the model that comes out."
            )


def check_no_adapters(module: nn.Module, lm: nn.Module) -> None:
    """Refuse an LM with adapters: no stock class has their parameters, and no cut knows what their axes stand for.

    Raises:
        ConfigError: `peft` has put adapters into it, or wraps it.
    """
    adapted = [name for name, child in lm.named_modules() if hasattr(child, "base_layer")]
    wrapped = [
        name for name, child in module.named_modules() if hasattr(child, "peft_config") and lm in set(child.modules())
    ]
    if adapted or wrapped:
        where = f"such as {adapted[0]}" if adapted else f"in {wrapped[0]}"
        raise ConfigError(
            f"The LM has PEFT adapters ({where}), which no cut can go through: merge the adapters first "
            "(`merge_and_unload()`), or prune the plain model and add a LoRARecovery, which makes adapters after the "
            "cut."
        )


def packed_in(root: nn.Module) -> str | None:
    """The first parameter below `root` that is quantized and packed, in words; None if there is none."""
    for name, parameter in root.named_parameters():
        if not _is_plain(parameter):
            return f"{name} ({type(parameter).__name__}, {parameter.dtype})"
    return None


def _is_plain(parameter: nn.Parameter) -> bool:
    """Whether a parameter is an ordinary tensor of numbers, each of them a weight."""
    subclass = type(parameter) is not nn.Parameter and type(parameter.data) is not Tensor
    return parameter.is_floating_point() and not subclass


def check_packed(anatomy: Anatomy, units: Collection[Structure]) -> None:
    """Refuse cuts in width of quantized weights. Cuts of layers leave every weight that stays as it is.

    Args:
        anatomy: of the LM.
        units: the structures, other than layers, of which something will go.

    Raises:
        ConfigError: a parameter that would become smaller is packed.
    """
    for site in anatomy.sites():
        if not any(run.unit in units for axis in site.axes for run in axis or ()):
            continue
        packed = packed_in(site.module)
        if packed is None and not site.is_norm and not [*site.module.parameters()]:
            packed = type(site.module).__name__  # it keeps what it has of weights elsewhere
        if packed is not None:
            raise ConfigError(
                f"The LM's {site.path} is quantized (it has {packed}), and packed weights can be neither scored nor "
                f"sliced: load the model without quantization to cut {', '.join(sorted(units))}, or cut layers only."
            )


def check_packed_writers(anatomy: Anatomy, part: str) -> None:
    """Refuse to scale the outputs of quantized weights, as masks between 0 and 1, and learned scales, do at the cut.

    Args:
        anatomy: of the LM.
        part: the callback that does.

    Raises:
        ConfigError: a projection that writes to the residual stream is packed.
    """
    for writer in anatomy.writers():
        packed = packed_in(writer.module)
        if packed is not None:
            raise ConfigError(
                f"{part} writes what it learns into the weights at the cut, and those of layer {writer.layer} are "
                f"quantized (it has {packed}): load the model without quantization, or choose layers by another part, "
                "such as BlockInfluenceSelector."
            )


def check_averages(module: nn.Module, anatomy: Anatomy) -> None:
    """Refuse averages of the LM's weights, which are copies of the uncut model. Those of another network are fine.

    Raises:
        ConfigError: there is one in the module.
    """
    for name, child in module.named_modules():
        if isinstance(child, AveragedModel) and _averages_the_lm(child, module, anatomy):
            raise ConfigError(
                f"{name} is an AveragedModel: it keeps a copy of the uncut model and would average different layers "
                "after the cut. Leave it out, or average in a run of its own."
            )


def _averages_the_lm(average: AveragedModel, module: nn.Module, anatomy: Anatomy) -> bool:
    """Whether an average is a copy of the LM, by its shapes; where another network has these too, by its weights."""
    kind, inside = type(anatomy.layers[0]), set(anatomy.lm.modules()) | set(average.modules())
    copies = [stack for stack in _stacks(average, kind) if _shapes(stack) == _shapes(anatomy.layers)]
    others = [stack for stack in _stacks(module, kind) if stack not in inside]
    return any(
        _same_weights(copy, anatomy.layers) or not any(_same_weights(copy, other) for other in others)
        for copy in copies
    )


def _stacks(root: nn.Module, kind: type[nn.Module]) -> list[nn.ModuleList]:
    """The lists of layers of this kind."""
    return [
        child for child in root.modules() if isinstance(child, nn.ModuleList) and len(child) and type(child[0]) is kind
    ]


def _shapes(root: nn.Module) -> dict[str, torch.Size]:
    return {name: whole_shape(parameter) for name, parameter in root.named_parameters()}


def _same_weights(left: nn.Module, right: nn.Module) -> bool:
    if _shapes(left) != _shapes(right):
        return False
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    # On the meta device there are no values yet by which to tell one from the other.
    return all(a.is_meta or b.is_meta or torch.equal(gathered(a), gathered(b).to(a)) for a, b in pairs)


def check_sliced(module: nn.Module, anatomy: Anatomy, layers: Collection[int], units: Collection[Structure]) -> None:
    """Refuse what depends on weights that a cut removes or makes smaller; warn of what may read their output.

    Args:
        module: what holds the causal LM.
        anatomy: of the LM.
        layers: the indices of the layers that may go.
        units: the structures, other than layers, of which something will go.

    Raises:
        ConfigError: a parameter that is replaced has hooks for its gradient, or see `check_aliases`.
    """
    units = set(units)
    if units & {"heads", "kv_groups"}:
        units |= {"heads", "kv_groups"}
    for weight in sliced_weights(anatomy, units):
        if _hooked(weight.parameter):
            raise ConfigError(
                f"{weight.path} has hooks for its gradient, and the cut puts a smaller parameter in its place, of "
                "which they would see nothing: remove them, or leave its structure out of the selectors' counts."
            )
    check_aliases(module, anatomy, layers, units)
    if "hidden" in units:
        inside = set(anatomy.lm.modules())
        outside = {name: child for name, child in module.named_modules() if child not in inside}
        _warn_of_readers(outside, anatomy.shape.hidden)


def _hooked(parameter: nn.Parameter) -> bool:
    """Whether a user's hooks wait for the parameter's gradient; deepspeed leaves its own behind after a fit."""
    modules = [str(getattr(hook, "__module__", "")) for hook in gradient_hooks(parameter)]
    return any(not module.startswith("deepspeed") for module in modules)


def _warn_of_readers(outside: dict[str, nn.Module], hidden: int) -> None:
    others = [name for name, child in outside.items() if isinstance(child, PreTrainedModel)]  # a teacher, say
    for name, child in outside.items():
        if any(name == other or name.startswith(f"{other}.") for other in others):
            continue
        if any(hidden in parameter.shape for parameter in child.parameters(recurse=False)):
            rank_zero_warn(
                f"{name} has a dimension of {hidden}, as the LM's hidden states have now: if it reads these, the cut "
                "of hidden dimensions will leave it with inputs of another size."
            )
