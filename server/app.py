"""The coordinator's Flower ServerApp: waits for the sites, then conducts the study over the Grid it is given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from xfed.common.config import Study
from xfed.common.journal import Journal, Listener
from xfed.common.version import SOFTWARE
from xfed.server.census import census_of
from xfed.server.checkpoints import Checkpoints
from xfed.server.conduct import conduct
from xfed.server.joining import Proposal, join
from xfed.server.run import Run

__all__ = ["make_server_app"]


def make_server_app(
    study: Study,
    folder: Path,
    listener: Listener | None = None,
    proposal: Proposal | None = None,
    members: Mapping[str, str] | None = None,
) -> ServerApp:
    """A ServerApp that runs or continues `study` in `folder`; every event goes to events.jsonl and to `listener`.

    With a `proposal` (a real federation) each site must approve the plan first, and has the name its key was admitted under.
    `members`: site to public key, where there is no proposal that names them; a private study needs them.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        journal = Journal(folder / "events.jsonl", listener)
        before = any(event["kind"] in ("started", "resumed") for event in journal.read())
        journal.write(
            "resumed" if before else "started", text=f"study {study.name} {study.digest[:12]} with {SOFTWARE}"
        )
        exchange, descriptions = join(grid, study, journal, proposal)
        run = Run(
            study=study,
            folder=folder,
            exchange=exchange,
            journal=journal,
            checkpoints=Checkpoints(folder / "checkpoints", study.digest),
            descriptions=descriptions,
            members=members if members is not None else proposal.members if proposal is not None else {},
            # in a private study the sizes are declared ones, which are public
            census=census_of(descriptions, len(study.classes), study.secure and not study.private),
        )
        conduct(run)

    return app
