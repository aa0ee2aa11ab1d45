"""Whether devices multiply bfloat16 and float16 natively, or emulate them, which is slow."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightprune.integrations.torch_modules import cpu_features_before_2_13

# What a CPU needs, by the names of `torch.cpu.get_capabilities`.
_CPU_UNITS = {
    torch.bfloat16: {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16", "bf16": "Arm's BF16"},
    torch.float16: {"avx512_fp16": "AVX512-FP16", "amx_fp16": "AMX-FP16", "fp16_arith": "Arm's FP16"},
}
# The limits of oneDNN, which multiplies the matrices, under which it uses none of these units.
_ONEDNN_WITHOUT = ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni")
_ARM = ("aarch64", "arm64")
# The compute capability of CUDA devices from which on they multiply a format.
_CUDA_LEAST = {torch.bfloat16: (8, 0), torch.float16: (5, 3)}


@dataclass(frozen=True)
class Support:
    """Whether devices multiply a format natively; None where nothing tells. `reason` is the rest of a sentence."""

    native: bool | None
    reason: str


def native_support(devices: Sequence[torch.device], dtype: torch.dtype) -> Support:
    """Whether all devices multiply matrices of a 16-bit format natively.

    Asking CUDA initializes it in this process.

    Args:
        devices: the devices of this node.
        dtype: `torch.bfloat16` or `torch.float16`.
    """
    name = _name(dtype)
    kinds = {device.type for device in devices}
    if kinds == {"cpu"}:
        return _on_cpu(dtype)
    if kinds == {"cuda"}:
        return _on_cuda(devices, dtype)
    if kinds == {"mps"}:  # M1 and M2 emulate bfloat16; on later chips autocast saves memory but no time
        return Support(None, f"PyTorch does not tell whether this Apple GPU multiplies {name} natively")
    return Support(None, f"PyTorch does not tell whether these devices multiply {name} natively")


def _on_cuda(devices: Sequence[torch.device], dtype: torch.dtype) -> Support:
    if torch.version.hip:
        return Support(True, f"PyTorch supports {_name(dtype)} on all ROCm devices")
    least = _CUDA_LEAST[dtype]
    for device in devices:
        found = torch.cuda.get_device_capability(device)
        if found < least:
            return Support(
                False,
                f"{torch.cuda.get_device_name(device)} does not multiply {_name(dtype)} natively: its compute "
                f"capability is {found[0]}.{found[1]}, below {least[0]}.{least[1]}",
            )
    names = dict.fromkeys(torch.cuda.get_device_name(device) for device in devices)
    return Support(True, f"{' and '.join(names)} can multiply {_name(dtype)} natively")


def _on_cpu(dtype: torch.dtype) -> Support:
    name, units = _name(dtype), _CPU_UNITS[dtype]
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return Support(False, f"this build of PyTorch lacks oneDNN, which multiplies {name} natively on CPUs")
    features = _cpu_features()
    if features is None:
        return Support(None, f"this version of PyTorch does not tell whether the CPU multiplies {name} natively")
    found = " and ".join(label for feature, label in units.items() if feature in features)
    if not found:
        return Support(False, f"this CPU does not multiply {name} natively: it has no {', '.join(units.values())}")
    limit = _cpu_limit()
    if limit is not None:
        return Support(False, f"{limit} in the environment hides this CPU's {found}")
    return Support(True, f"this CPU multiplies {name} natively by {found}")


def _cpu_features() -> set[str] | None:
    """What the CPU can do, by the names of `torch.cpu.get_capabilities`; None where this PyTorch does not tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        return {name for name, has in capabilities().items() if has is True}
    return cpu_features_before_2_13(arm=platform.machine().lower() in _ARM)


def _cpu_limit() -> str | None:
    """The variable of the environment that hides the CPU's 16-bit units, as `NAME=value`."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):  # the second is the older name of the first
        value = os.environ.get(name, "")
        if value.lower() in _ONEDNN_WITHOUT:
            return f"{name}={value}"
    # oneDNN does not heed this one, but whoever sets it asks for the arithmetic of an older CPU.
    value = os.environ.get("ATEN_CPU_CAPABILITY", "")
    return f"ATEN_CPU_CAPABILITY={value}" if value in ("default", "avx2") else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
