"""Whether one site's ledger is whole, signed, complete and in a lawful order.

::

    ledgers/SITE.jsonl      --read_line, seq, prev, Ed25519--> lines --xfed.common.auditor.attempts--> attempts
    ledgers/SITE.pub.json   --the site's P-384 key vouches for the ledger's key-->     |
    ledgers/SITE.head.json  --signed; not newer than the last line-->                  +--> SiteAudit (problems, attempts)
    marks (seq, hash) that the coordinator kept --each is a line of the file-->        |

Pure: bytes in, findings out. Reading files is `xfed.common.auditor.evidence`.

Formal guarantees
    Without problems: no byte of ledger, head or key file was changed since signed by the holder of the ledger's key; no line
    before the newest of head and marks is missing, exchanged or put in.
Not covered
    Lines cut off behind the newest head and mark that the auditor was given. A site that never wrote a line of what it did.
    Whose key the endorsing one is: its fingerprint is to be compared with one that came in another way (`known_key`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xfed.common.auditor.attempts import Attempt, follow
from xfed.common.auditor.keys import canonical, ed25519_signed, p384_signed, plain_base64, read_json
from xfed.common.auditor.lines import START, Line, is_hash, read_line

__all__ = ["Mark", "Problem", "SiteAudit", "audit_site"]

_ASK_SITE = "ask the site for its ledger again and keep both copies"
_STOP = "keep both copies, ask the site who changed its ledger, and count on none of its claims until that is known"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One finding: file, line (1, 2, ...; None for the whole file), what is wrong, what to do."""

    file: str
    line: int | None
    what: str
    remedy: str

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file} line {self.line}"
        return f"{where}: {self.what}. To do: {self.remedy}"


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A line that somebody else remembers: `source` says who and where."""

    source: str
    seq: int
    hash: str


@dataclass(frozen=True, kw_only=True)
class SiteAudit:
    """What is known of one site. `readable`: every line could be read, so that no spend is overlooked.

    `endorsed_by` is the fingerprint of the site's key as the endorsement names it (None where that could not be read).
    """

    site: str
    file: str
    lines: tuple[Line, ...]
    attempts: tuple[Attempt, ...]
    problems: tuple[Problem, ...]
    readable: bool
    endorsed_by: str | None
    head: tuple[int, str]

    @property
    def verified(self) -> bool:
        """Whether nothing was found."""
        return not self.problems


def audit_site(
    site: str,
    ledger: bytes,
    head: bytes | None,
    key: bytes | None,
    *,
    marks: Sequence[Mark] = (),
    known_key: str | None = None,
    file: str = "",
) -> SiteAudit:
    """Everything that can be said of a ledger from its bytes, those of its head and key files, and the coordinator's marks."""
    file = file or f"{site}.jsonl"
    stem = file.removesuffix(".jsonl")
    public, endorsed_by, problems = _endorsement(site, key, f"{stem}.pub.json", known_key)
    lines, readable, broken = _chain(site, ledger, public, file)
    problems += broken
    problems += _head(site, head, public, lines, stem)
    problems += _marks(lines, marks, file)
    attempts, unlawful = follow(lines)
    problems += [Problem(file=file, line=seq, what=what, remedy=_STOP) for seq, what in unlawful]
    last = (lines[-1].seq, lines[-1].hash) if lines else (0, START)
    return SiteAudit(
        site=site,
        file=file,
        lines=tuple(lines),
        attempts=attempts,
        problems=tuple(problems),
        readable=readable,
        endorsed_by=endorsed_by,
        head=last,
    )


def _endorsement(
    site: str, data: bytes | None, file: str, known: str | None
) -> tuple[bytes | None, str | None, list[Problem]]:
    """The ledger's key (32 bytes) if it can be read, who vouches for it, and what is wrong with that."""

    def wrong(what: str, remedy: str = _ASK_SITE) -> list[Problem]:
        return [Problem(file=file, line=None, what=what, remedy=remedy)]

    if data is None:
        return (
            None,
            None,
            wrong("the file is missing: nobody vouches for the key of the ledger", "copy it from the run"),
        )
    try:
        values = read_json(data)
    except ValueError as error:
        return None, None, wrong(f"changed: {error}")
    if values.keys() != {"site", "public_key", "endorsed_by", "signature"}:
        return None, None, wrong("it must hold site, public_key, endorsed_by and signature")
    public, by, signature = plain_base64(values["public_key"]), values["endorsed_by"], values["signature"]
    if public is None or len(public) != 32 or not isinstance(by, str) or not isinstance(signature, str):
        return None, None, wrong("its key, fingerprint or signature is none")
    found = []
    if values["site"] != site:
        found += wrong(f"it is of the site {values['site']!r:.80}, not of {site}")
    signed = {name: values[name] for name in ("site", "public_key", "endorsed_by")}
    if not p384_signed(by, b"xfed ledger-key v1\n" + canonical(signed), signature):
        found += wrong("the site's key did not sign this ledger key: it was changed or replaced")
    if known is not None and by != known:
        found += wrong(f"vouched for by {by:.60}, but the site's key is {known:.60}: the key was replaced", _STOP)
    return public, by, found


def _chain(site: str, data: bytes, public: bytes | None, file: str) -> tuple[list[Line], bool, list[Problem]]:
    """The lines that can be read, whether that is all of them, and where the chain breaks."""
    lines: list[Line] = []
    problems: list[Problem] = []
    readable = True
    seq, prev = 0, START

    def wrong(number: int, what: str) -> None:
        problems.append(Problem(file=file, line=number, what=what, remedy=_STOP))

    pieces = data.split(b"\n")
    if pieces.pop():
        pieces.append(data.rpartition(b"\n")[2])
        wrong(len(pieces), "the last line has no end: the copy was cut, or the file was changed")
    for number, piece in enumerate(pieces, 1):
        try:
            line = read_line(piece + b"\n")
        except ValueError as error:
            wrong(number, f"changed: {error}")
            readable = False
            seq, prev = seq + 1, ""
            continue
        if line.site != site:
            wrong(number, f"foreign: it is of the site {line.site!r:.80}; the file's name says {site}")
        if public is not None and not ed25519_signed(public, b"xfed ledger-line v1\n" + line.hash.encode(), line.sig):
            wrong(number, "forged: the key of this ledger did not sign it")
        if line.seq != seq + 1:
            word = "missing" if line.seq > seq + 1 else "rewritten"
            wrong(number, f"{word}: line {seq + 1} is expected, and this one says it is {line.seq}")
        elif prev and line.prev != prev:
            wrong(number, f"forked: it continues another line {seq} than the one before it")
        seq, prev = line.seq, line.hash
        lines.append(line)
    return lines, readable, problems


def _head(site: str, data: bytes | None, public: bytes | None, lines: list[Line], stem: str) -> list[Problem]:
    file = f"{stem}.head.json"

    def wrong(what: str, remedy: str = _ASK_SITE) -> list[Problem]:
        return [Problem(file=file, line=None, what=what, remedy=remedy)]

    if data is None:
        return wrong(
            "the file is missing: without a signed head nobody can say whether lines were cut off at the end",
            "copy it from the run, or ask the site for a head",
        )
    try:
        values: dict[str, Any] = read_json(data)
    except ValueError as error:
        return wrong(f"changed: {error}")
    names = ("site", "seq", "hash", "public_key", "time")
    if values.keys() != {*names, "sig"} or type(values["seq"]) is not int or values["seq"] < 0:
        return wrong(f"it must hold {', '.join(names)} and sig")
    found = []
    if values["site"] != site:
        found += wrong(f"it is of the site {values['site']!r:.80}, not of {site}")
    if public is not None:
        signed = b"xfed ledger-head v1\n" + canonical({name: values[name] for name in names})
        sig = values["sig"]
        if (
            plain_base64(values["public_key"]) != public
            or not isinstance(sig, str)
            or not ed25519_signed(public, signed, sig)
        ):
            found += wrong("forged: the key of this ledger did not sign it")
    mark = Mark(source=file, seq=values["seq"], hash=values["hash"])
    return found + _marks(lines, [mark], f"{stem}.jsonl")


def _marks(lines: list[Line], marks: Sequence[Mark], file: str) -> list[Problem]:
    """Each mark must be a line of the file, at its place."""
    held = {line.seq: line.hash for line in lines} | {0: START}
    last = max(held)
    problems = []
    for mark in marks:
        if not is_hash(mark.hash):
            what = f"{mark.source} remembers line {mark.seq}, but not by a hash"
        elif mark.seq > last:
            what = f"lines were cut off at the end: {mark.source} remembers line {mark.seq}, the file ends at {last}"
        elif mark.seq in held and held[mark.seq] != mark.hash:
            what = f"rewritten: {mark.source} remembers another line {mark.seq} (hash {mark.hash[:12]}...)"
        elif mark.seq not in held:
            what = f"line {mark.seq} is missing or unreadable, and {mark.source} remembers it"
        else:
            continue
        problems.append(Problem(file=file, line=mark.seq or None, what=what, remedy=_STOP))
    return problems
