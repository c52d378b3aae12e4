"""How a synthetic image says so of itself, so that nobody takes it for a patient's.

::

    archive/images/*.png      a text chunk "Comment" that holds `MARK`
    DICOM of an export        SyntheticData (0008,001C) "YES", PatientName `DICOM_NAME`, ImageComments that begin with `MARK`
    xfed-client import        refuses both (xfed.client.decode)
"""

from __future__ import annotations

from typing import Any, Protocol

__all__ = ["DICOM_NAME", "MARK", "says_synthetic"]

MARK = "SYNTHETIC image of xfed: not a patient"
DICOM_NAME = "SYNTHETIC^XFED"


class _Facts(Protocol):
    def get(self, key: str, default: str, /) -> Any: ...


def says_synthetic(facts: _Facts) -> bool:
    """Whether a PNG's text (``image.info``) or a DICOM data set says that its picture is synthetic.

    SyntheticData: DICOM PS3.3, C.12.1 (SOP Common Module), whoever made the file.
    """
    marked = (facts.get("SyntheticData", ""), facts.get("PatientName", ""))
    comments = (facts.get("Comment", ""), facts.get("ImageComments", ""))
    return (
        str(marked[0]).strip().upper() == "YES"
        or str(marked[1]).strip().upper() == DICOM_NAME
        or any(str(text).startswith(MARK) for text in comments)
    )
