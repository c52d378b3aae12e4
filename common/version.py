"""Which software computed this: for messages, reports and ledgers."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

__all__ = ["SOFTWARE", "versions"]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


SOFTWARE = f"xfed {_version('xfed')}"


def versions() -> dict[str, str]:
    """Versions of xfed, of what it stands on, and of the machine."""
    import torch  # takes seconds: `SOFTWARE` alone does not need it

    packages = ("xfed", "flwr", "torch", "numpy", "pillow", "pydantic", "safetensors", "opacus")
    return {
        **{package: _version(package) for package in packages},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
