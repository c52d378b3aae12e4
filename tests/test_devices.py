"""Devices: what is demanded and absent is said; what is emulated is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from xfed.common.devices import autocast, bfloat16_is_native, choose_device
from xfed.common.errors import DeviceError

CPU = torch.device("cpu")


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    assert choose_device("cpu") == CPU
    with pytest.raises(DeviceError, match=r"runtime\.device"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("flags", "native"),
    [("fpu avx2 avx512f", False), ("fpu avx512_bf16", True), ("amx_bf16 amx_tile", True), ("asimd bf16", True)],
)
def test_the_processors_flags_decide(tmp_path: Path, flags: str, native: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"model name : x\nflags : {flags}\n")
    assert bfloat16_is_native(CPU, tmp_path / "cpuinfo") is native
    assert bfloat16_is_native(CPU, tmp_path / "absent")


def test_autocast_changes_products_and_only_when_asked() -> None:
    a = torch.rand(8, 8)
    with autocast(CPU, "bfloat16"):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(CPU, "float32"):
        assert (a @ a).dtype == torch.float32
