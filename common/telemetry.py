"""Nothing calls home: no telemetry, no update check, no usage statistics; and Flower's own chatter stays out of our logs."""

from __future__ import annotations

import logging
import os

__all__ = ["silence"]


def silence() -> None:
    """Set Flower's and Ray's switches, unless the environment has its own, and keep their warnings and errors only."""
    for name, value in (
        ("FLWR_TELEMETRY_ENABLED", "0"),
        ("FLWR_DISABLE_UPDATE_CHECK", "1"),
        ("RAY_USAGE_STATS_ENABLED", "0"),
        ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"),
    ):
        os.environ.setdefault(name, value)
    logging.getLogger("flwr").setLevel(logging.WARNING)
