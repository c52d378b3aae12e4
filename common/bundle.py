"""The Flower App Bundle of an xfed run: a name tag, not code.

::

    coordinator: run record carries DIGEST --> site: the plan's, and the installed xfed's? -- no --> refused, nothing is loaded

Flower ships a run's code in its bundle. xfed never does: the site's process runs the installed package only, and nothing
opens what a coordinator puts into a bundle. The bundle below holds one `pyproject.toml` that names the installed
components; its digest changes when the exchanged messages do.
"""

from __future__ import annotations

import hashlib
import io
import zipfile

__all__ = ["CONTENT", "DIGEST", "NAME", "PROTOCOL", "VERSION"]

NAME = "xfed/xfed"
VERSION = "0.2.0"
PROTOCOL = 2
_PYPROJECT = f"""[project]
name = "xfed"
version = "{VERSION}"

[tool.flwr.app]
publisher = "xfed"

[tool.flwr.app.components]
serverapp = "xfed.server.app:make_server_app"
clientapp = "xfed.client.app:make_client_app"

[tool.xfed]
protocol = {PROTOCOL}
"""


def _zip(text: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo("pyproject.toml", date_time=(1980, 1, 1, 0, 0, 0)), text)
    return buffer.getvalue()


CONTENT = _zip(_PYPROJECT)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
