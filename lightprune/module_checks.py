"""What no cut could carry along, found in the user's module as it is bound, and refused before anything trains."""

from collections.abc import Iterable, Iterator

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel

from lightprune.anatomy import Anatomy, Structure, Weight
from lightprune.errors import ConfigError


def check_eager(module: nn.Module) -> None:
    """Refuse what is compiled: gates and penalties that attach later would be no part of what was compiled.

    Raises:
        ConfigError: the module, or one in it, went through `torch.compile`.
    """
    marks = ("_orig_mod", "_compiled_call_impl", "_compiler_ctx")  # a wrapper; in place; Lightning's own
    for name, child in module.named_modules():
        if any(getattr(child, mark, None) is not None for mark in marks):
            raise ConfigError(
                f"{name or type(module).__name__} is compiled, and gates and penalties cannot join what is: leave "
                "`torch.compile` out of a run that prunes, and compile the model that comes out."
            )


def check_averages(module: nn.Module, anatomy: Anatomy) -> None:
    """Refuse averages of the LM's weights, which are copies of the uncut model.

    Raises:
        ConfigError: there is one in the module.
    """
    layer = type(anatomy.layers[0])
    for name, child in module.named_modules():
        if isinstance(child, AveragedModel) and any(type(inner) is layer for inner in child.modules()):
            raise ConfigError(
                f"{name} is an AveragedModel: it keeps a copy of the uncut model and would average different layers "
                "after the cut. Leave it out, or average in a run of its own."
            )


def check_sliced(module: nn.Module, anatomy: Anatomy, structures: Iterable[Structure]) -> None:
    """Refuse what hangs on a parameter that a cut in width replaces by a smaller one; warn of what may read its output.

    Args:
        module: what holds the causal LM.
        anatomy: of the LM.
        structures: what will be cut.

    Raises:
        ConfigError: such a parameter has hooks for its gradient, or a module outside the LM has it too.
    """
    units = set(structures)
    if units & {"heads", "kv_groups"}:
        units |= {"heads", "kv_groups"}
    inside = set(anatomy.lm.modules())
    outside = {name: child for name, child in module.named_modules() if child not in inside}
    shared = {p: f"{name}.{key}" for name, child in outside.items() for key, p in child._parameters.items()}
    for weight in _sliced(anatomy, units):
        parameter = weight.parameter
        if _hooked(parameter):
            raise ConfigError(
                f"{weight.path} has hooks for its gradient, and the cut puts a smaller parameter in its place, of "
                "which they would see nothing: remove them, or leave its structure out of the selectors' counts."
            )
        if parameter in shared:
            raise ConfigError(
                f"{shared[parameter]} is the LM's {weight.path}, and the cut puts a smaller parameter in its place in "
                "the LM alone: give it a parameter of its own, or leave its structure out of the selectors' counts."
            )
    if "hidden" in units:
        _warn_of_readers(outside, anatomy.shape.hidden)


def _sliced(anatomy: Anatomy, units: set[Structure]) -> Iterator[Weight]:
    for weight in anatomy.weights():
        if any(run.unit in units for axis in weight.axes for run in axis or ()):
            yield weight


def _hooked(parameter: nn.Parameter) -> bool:
    """Whether a user's hooks wait for the parameter's gradient; deepspeed leaves its own behind after a fit."""
    hooks = [*(parameter._backward_hooks or {}).values(), *(parameter._post_accumulate_grad_hooks or {}).values()]
    return any(not str(getattr(hook, "__module__", "")).startswith("deepspeed") for hook in hooks)


def _warn_of_readers(outside: dict[str, nn.Module], hidden: int) -> None:
    others = [name for name, child in outside.items() if isinstance(child, PreTrainedModel)]  # a teacher, say
    for name, child in outside.items():
        if any(name == other or name.startswith(f"{other}.") for other in others):
            continue
        if any(p is not None and hidden in p.shape for p in child._parameters.values()):
            rank_zero_warn(
                f"{name} has a dimension of {hidden}, as the LM's hidden states have now: if it reads these, the cut "
                "of hidden dimensions will leave it with inputs of another size."
            )
