"""Which device, how many threads, which arithmetic: decided once, before any data is read."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from xfed.common.errors import DeviceError

__all__ = ["autocast", "bfloat16_is_native", "choose_device", "memory_format"]


def choose_device(demand: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda". Raises `DeviceError` when a GPU is demanded and none is usable."""
    if demand == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "runtime.device is cuda, but this machine has no GPU that PyTorch can use. Set runtime.device to auto or cpu, "
            "or install a CUDA build of PyTorch and the driver (nvidia-smi must list the card)."
        )
    if demand == "auto":
        demand = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(demand)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Convolutions and products in bfloat16 when `precision` says so; weights, losses and optimizers stay float32."""
    if precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def bfloat16_is_native(device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the device computes in bfloat16 itself. Elsewhere PyTorch emulates it: right, but slower than float32.

    For a CPU the flags of `cpuinfo` decide (avx512_bf16, amx_bf16, or bf16 on Arm); where there is no such file, True is assumed.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        words = set(cpuinfo.read_text(encoding="utf-8").split())
    except OSError:
        return True
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def memory_format(device: torch.device) -> torch.memory_format:
    """channels_last: measured faster on CPU and GPU alike (docs/benchmarks.md)."""
    return torch.channels_last
