"""What all sections of a study file have in common: frozen, unknown keys refused, finite numbers."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Section"]


class Section(BaseModel):
    """A section of a study file."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
