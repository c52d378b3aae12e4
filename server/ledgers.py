"""The coordinator's copies of the sites' privacy ledgers: fetched after every private round, checked, and never taken back.

::

    after a private round:  ShowLedger(first = what is known + 1) --> every site --> LedgerLines(lines, head, key)
      key:    vouched for by the key the site was admitted with; pinned in ledgers/<site>.pub.json
      lines:  continue the known chain, signed --> ledgers/<site>.jsonl (appended)     a fork, a gap, a rewrite: FederationError
      head:   --> ledgers/<site>.head.json, and a "ledger" event with phase and round in events.jsonl

So a site cannot rewrite what it has shown, and the coordinator cannot deny having seen it. A copy holds the site's whole
ledger, other studies' events included: budgets are per patient, not per study. A site that shows nothing is noted and asked
again after the next round; nothing waits for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from xfed.common.durable import append_line, write_json
from xfed.common.errors import FederationError, IdentityError
from xfed.common.identity import parse_public_key
from xfed.common.ledger_lines import START, Head, Line, check_endorsement, check_head, read_line, verify_chain
from xfed.common.messages import LedgerLines, Reply, Request

__all__ = ["LedgerCopies", "LedgerCopy"]


class LedgerCopy:
    """The copy of one site's ledger in `folder`."""

    def __init__(self, folder: Path, site: str, identity: str) -> None:
        self._lines, self._head = folder / f"{site}.jsonl", folder / f"{site}.head.json"
        self._key, self._site, self._identity = folder / f"{site}.pub.json", site, identity

    def lines(self) -> list[Line]:
        """The lines known so far; a line that a kill cut off is dropped from the file. Raises `FederationError` when damaged."""
        if not self._lines.is_file():
            return []
        data = self._lines.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with self._lines.open("r+b") as file:
                file.truncate(len(whole))
        try:
            return [read_line(line) for line in _lines(whole)]
        except ValueError as error:
            raise FederationError(
                f"{self._lines} was changed ({error}). Put the file back, or delete it: it is then fetched from the site again."
            ) from error

    def head(self) -> Head:
        """Number and hash of the last known line."""
        lines = self.lines()
        return lines[-1].head if lines else START

    def take(self, reply: LedgerLines) -> Head:
        """Check and append what the site showed; returns the new head. Raises `FederationError` or `IdentityError`."""
        key = self._public_key(reply.key)
        known = self.head()
        new = verify_chain(_lines(reply.lines.encode()), key, site=self._site, after=known)
        head = new[-1].head if new else known
        shown = _json(reply.head, self._site)
        if check_head(shown, key, site=self._site) != head:
            raise FederationError(
                f"{self._site} signed another head of its privacy ledger than the lines it showed lead to: it holds lines back"
            )
        for line in _lines(reply.lines.encode()):
            append_line(self._lines, line.decode().removesuffix("\n"))
        write_json(self._head, shown)
        return head

    def _public_key(self, text: str) -> Ed25519PublicKey:
        values = _json(text, self._site)
        if self._key.is_file():
            pinned = json.loads(self._key.read_text(encoding="utf-8"))
            if pinned.get("public_key") != values.get("public_key"):  # the rest changes when a site's key is rotated
                raise FederationError(
                    f"{self._site} shows another ledger key than before ({self._key}): its ledger was replaced. Ask the site."
                )
        identity = parse_public_key(self._identity, f"the key of {self._site}")
        key = check_endorsement(values, identity, site=self._site)
        write_json(self._key, values)
        return key


class LedgerCopies:
    """All copies of a run. `members`: site to admitted public key (OpenSSH)."""

    def __init__(self, folder: Path, members: Mapping[str, str]) -> None:
        self._folder, self._members = folder, dict(members)

    def copy(self, site: str) -> LedgerCopy:
        """The copy of one site's ledger. Raises `FederationError` for a site that was not admitted."""
        if site not in self._members:
            raise FederationError(f"{site} is not among the members of this study: its ledger key cannot be checked")
        return LedgerCopy(self._folder, site, self._members[site])

    def fold(self, heads: dict[str, Head]) -> Any:
        """A fold for `Run.ask` that takes `LedgerLines` and notes each site's head in `heads`."""

        def take(site: str, request: Request, reply: Reply) -> None:
            if not isinstance(reply, LedgerLines):
                raise FederationError(f"{site} answered {type(reply).__name__} to ShowLedger")
            try:
                heads[site] = self.copy(site).take(reply)
            except IdentityError as error:
                raise FederationError(str(error)) from error

        return take


def _lines(data: bytes) -> list[bytes]:
    """Lines with their newline; other characters that Python calls line ends may stand in a class's name."""
    return [line + b"\n" for line in data.split(b"\n") if line]


def _json(text: str, site: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise FederationError(f"{site} showed its ledger in no form that can be read ({error})") from error
    if not isinstance(values, dict):
        raise FederationError(f"{site} showed its ledger in no form that can be read")
    return values
