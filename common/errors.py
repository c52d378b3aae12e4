"""Every error that xfed raises on purpose, and the exit code a command ends with.

::

    XfedError                1   anything else that xfed raises on purpose
    ├── ConfigError          2   a study file, an option or a label map is wrong
    ├── DataError            3   images, labels or a store cannot be used
    ├── CheckpointError      4   a run folder belongs to another study, or is damaged
    ├── DeviceError          5   a device was demanded that is not there
    ├── StorageError         6   the disk is full, read-only, or locked by another run
    ├── FederationError      7   a round had no quorum, or a site answered nonsense
    ├── RefusedError         8   a site's policy or settings forbid what was asked
    └── IdentityError        9   a key, certificate, kit, plan or signature is not what it should be

0 is success and 130 an interrupt (Ctrl-C). Every message says what happened, where, and what to do next.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeviceError",
    "FederationError",
    "IdentityError",
    "RefusedError",
    "StorageError",
    "XfedError",
]


class XfedError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what a command ends with."""

    exit_code = 1


class ConfigError(XfedError):
    """A configuration file, option or mapping is wrong."""

    exit_code = 2


class DataError(XfedError):
    """Images, labels or an image store cannot be used."""

    exit_code = 3


class CheckpointError(XfedError):
    """A run folder or checkpoint belongs to another study, or is damaged."""

    exit_code = 4


class DeviceError(XfedError):
    """A device was demanded that this machine does not have."""

    exit_code = 5


class StorageError(XfedError):
    """The disk is full, read-only, or the folder is locked by another process."""

    exit_code = 6


class FederationError(XfedError):
    """A federated round could not be completed."""

    exit_code = 7


class RefusedError(XfedError):
    """A site refused a request; the message is the reason it gives to the coordinator."""

    exit_code = 8


class IdentityError(XfedError):
    """A key, certificate, kit, plan or signature is missing, expired, foreign or forged."""

    exit_code = 9
