"""What every message has in common; the messages themselves are in `xfed.common.messages`, all of them.

::

    coordinator --Request (study, session?)--> site --Reply (site)--> coordinator
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy.typing as npt

__all__ = ["Arrays", "Reply", "Request"]

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Request:
    """Base of what the coordinator asks. `flower_type` routes it; `study` is the study's digest.

    With a `session` the answer goes into a secure sum over the sites `peers` (names joined by commas);
    `total` is the number of images that the sum's weights are shares of (`xfed.common.secure_sum`).
    """

    flower_type: ClassVar[str] = "query.ask"
    study: str
    session: str = ""
    peers: str = ""
    total: int = 0

    @property
    def key(self) -> str:
        """Names this request among all of its study, for logs and stored answers."""
        parts = [type(self).__name__]
        for name in ("session", "class_name", "arm", "split", "shard", "round"):
            value = getattr(self, name, None)
            if value is not None:
                parts.append(str(value).replace(" ", "_"))
        return "-".join(parts)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Base of what a site answers; `site` is the name it gives itself."""

    site: str
