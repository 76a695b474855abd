"""Data types in which this machine multiplies matrices natively."""

import functools
from typing import Any

import torch


@functools.cache
def native_int8() -> bool:
    """Whether the processor multiplies int8 matrices natively, several times as fast as float32 ones."""
    return _cpu_has("avx512_vnni", "amx_int8")


@functools.cache
def native_bfloat16(device: str) -> bool:
    """Whether a type of device, such as "cuda", multiplies bfloat16 matrices natively, faster than float32 ones."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and _cpu_has("avx512_bf16", "amx_bf16", "bf16")


def _cpu_has(*names: str) -> bool:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.5 lacks it
    return any(capabilities.get(name) for name in names)


def free_memory(device: torch.device) -> int | None:
    """Bytes that tensors can still take on a GPU; None for other devices."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
