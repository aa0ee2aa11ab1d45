"""Private attributes of PyTorch's modules, parameters and optimizers."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def parts_of(module: nn.Module) -> dict[str, nn.Module | nn.Parameter | None]:
    """A module's own children and parameters by name; the same one comes twice if it has two names."""
    # torch 2.13: `_modules` and `_parameters`; `named_children` and `named_parameters` pass over second names. Without
    # them a second name for what a cut removes would be found too late.
    return {**module._modules, **module._parameters}


def with_parameters(module: nn.Module, parameters: Mapping[str, nn.Parameter | Tensor | None]) -> nn.Module:
    """A shallow copy of a module with these tensors for its own parameters; gradients reach what they are made of.

    A parameter that is not named is None in the copy.
    """
    same = copy.copy(module)
    # torch 2.13: `_parameters`; no public way takes what is no leaf, or names the parameters that are None.
    same.__dict__["_parameters"] = {**dict.fromkeys(module._parameters), **parameters}
    return same


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own buffers, to be replaced in place."""
    # torch 2.13: `_buffers`. Without it a buffer could not be put back as the object that it was.
    buffers: dict[str, Tensor | None] = module._buffers
    return buffers


def unsaved_buffers(module: nn.Module) -> list[str]:
    """The names of a module's own buffers that no state dict holds."""
    # torch 2.13: `_non_persistent_buffers_set`. Without it the export could not tell what is computed from the config.
    return [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]


def gradient_hooks(parameter: nn.Parameter) -> list[object]:
    """The hooks that wait for a parameter's gradient."""
    # torch 2.13: `_backward_hooks` and `_post_accumulate_grad_hooks`. Without them hooks that a cut loses go unnoticed.
    return [*(parameter._backward_hooks or {}).values(), *(parameter._post_accumulate_grad_hooks or {}).values()]


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile, or Lightning, has compiled a module, in place or in a wrapper."""
    # torch 2.13 and Lightning 2.6.6: `_orig_mod` is a wrapper's, `_compiled_call_impl` a module's compiled in place,
    # `_compiler_ctx` Lightning's own, `_torchdynamo_orig_callable` a compiled function's. Without them gates would
    # silently do nothing in compiled code.
    if any(getattr(module, mark, None) is not None for mark in ("_orig_mod", "_compiled_call_impl", "_compiler_ctx")):
        return True
    return hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")


def is_fused(optimizer: Optimizer) -> bool:
    """Whether an optimizer unscales gradients by itself."""
    # torch 2.13: `_step_supports_amp_scaling`. Without it Lightning's refusal would come after the selection.
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def inner_schedulers(scheduler: object) -> Sequence[object]:
    """The schedulers that a SequentialLR or a ChainedScheduler runs."""
    # torch 2.13: `_schedulers`. Without it these would keep the rates of groups that are gone.
    schedulers: Sequence[object] = getattr(scheduler, "_schedulers", ())
    return schedulers


def cpu_features_before_2_13(*, arm: bool) -> set[str] | None:
    """What the CPU can do, where `torch.cpu.get_capabilities` is not there yet; None where nothing tells.

    On Arm the operator reads the CPU's own bit. On x86 it must not be asked: it says yes to AVX-512 without BF16.
    """
    if arm:
        # torch 2.5 to 2.12: `_is_mkldnn_bf16_supported`. Without it `precision: auto` is 32-true there.
        ask = {"bf16": getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)}
    else:
        # torch 2.5 to 2.12: `_is_avx512_bf16_supported`, `_is_amx_tile_supported`, `_is_amx_fp16_supported`. Likewise.
        ask = {
            "avx512_bf16": getattr(torch.cpu, "_is_avx512_bf16_supported", None),
            "amx_bf16": getattr(torch.cpu, "_is_amx_tile_supported", None),
            "amx_fp16": getattr(torch.cpu, "_is_amx_fp16_supported", None),
        }
    known = {feature: question() for feature, question in ask.items() if question is not None}
    return {feature for feature, has in known.items() if has} if known else None
