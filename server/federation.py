"""The coordinator's folder: the federation's keys and certificates, and who is a member.

::

    found_federation --> federation.json, ca.key, ca.pem, server.key, server.pem      (the folder appears whole or not at all)
    request.json --read_request: signed by its own key--> Federation.approve
        --> membership.jsonl (a line) --> kits/<site>.kit.json (signed by the CA) --> members/<site>.json
    Federation.revoke --> membership.jsonl --> members/<site>.json

Membership is `members/` and nothing else, and it is written last: after a kill in between, the same command is run again. It is
read from disk at every question, so a running coordinator sees a revocation at once. `members/.lock` keeps two operators apart.
"""

from __future__ import annotations

import getpass
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization

from xfed.common.durable import exclusive, remove_tree, translate_os_errors, write_json, write_text
from xfed.common.errors import IdentityError
from xfed.common.identity import (
    SCHEMA,
    certificate_fingerprint,
    certificate_problem,
    check_site_name,
    fingerprint,
    format_time,
    load_private_key,
    new_authority,
    new_key,
    new_server_certificate,
    parse_address,
    parse_authority,
    parse_certificate,
    parse_host,
    parse_public_key,
    parse_time,
    sign_json,
    software,
    utc_now,
    verify_json,
)
from xfed.common.journal import Journal
from xfed.common.plan import JoinRequest, check_federation_name

__all__ = ["Federation", "Member", "found_federation", "load_federation"]

WARN = timedelta(days=30)


@dataclass(frozen=True, kw_only=True)
class Member:
    """A site that was admitted. `public_key` is one line of OpenSSH; times are UTC."""

    site: str
    public_key: str
    fingerprint: str
    approved: datetime
    expires: datetime
    revoked: datetime | None = None
    reason: str = ""

    def state(self, now: datetime) -> str:
        """active, expired or revoked."""
        return "revoked" if self.revoked is not None else "expired" if now >= self.expires else "active"

    @property
    def public_pem(self) -> bytes:
        """The key as PEM (SubjectPublicKeyInfo): how Flower names it on the wire."""
        key = parse_public_key(self.public_key, f"the key of {self.site}")
        return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

    def values(self) -> dict[str, Any]:
        """As in members/<site>.json."""
        return {
            "schema": SCHEMA,
            "site": self.site,
            "public_key": self.public_key,
            "fingerprint": self.fingerprint,
            "approved": format_time(self.approved),
            "expires": format_time(self.expires),
            "revoked": None if self.revoked is None else format_time(self.revoked),
            "reason": self.reason,
        }


@dataclass(frozen=True, kw_only=True)
class Federation:
    """A coordinator's folder. `address` is host:port as sites dial it, `names` the hosts in its certificate."""

    folder: Path
    name: str
    address: str
    names: tuple[str, ...]
    ca_pem: str

    @property
    def server_cert(self) -> Path:
        """The coordinator's TLS certificate."""
        return self.folder / "server.pem"

    @property
    def server_key(self) -> Path:
        """The coordinator's TLS key (mode 0600)."""
        return self.folder / "server.key"

    @property
    def state_path(self) -> Path:
        """Flower's link state (SQLite)."""
        return self.folder / "state.db"

    def sign(self, kind: str, values: Mapping[str, Any]) -> str:
        """Sign plain values with the CA's key. Raises `IdentityError`."""
        return sign_json(kind, values, load_private_key(self.folder / "ca.key"))

    def members(self) -> dict[str, Member]:
        """Everybody who was ever admitted, by name, as on disk now. Raises `IdentityError` when a file is damaged."""
        return {path.stem: _read_member(path) for path in sorted((self.folder / "members").glob("*.json"))}

    def active_members(self, now: datetime | None = None) -> dict[str, Member]:
        """The members that are neither revoked nor expired."""
        now = now or utc_now()
        return {site: member for site, member in self.members().items() if member.state(now) == "active"}

    def admitted_keys(self, now: datetime | None = None) -> frozenset[bytes]:
        """The PEM keys that may speak to the coordinator now."""
        return frozenset(member.public_pem for member in self.active_members(now).values())

    def approve(
        self,
        request: JoinRequest,
        *,
        days: int = 365,
        expected: str | None = None,
        again: bool = False,
        now: datetime | None = None,
    ) -> tuple[Member, Path]:
        """Admit a site for `days`; returns it and its kit. `expected`: the fingerprint the site told. Raises `IdentityError`.

        A member's name goes to another key only by a rotation that its present key signed, or `again` after a revocation.
        """
        now = now or utc_now()
        if expected is not None and expected != request.fingerprint:
            raise IdentityError(
                f"{request.where}: its key is {request.fingerprint}, not {expected}. Do not admit it: find out whose it is."
            )
        with exclusive(self.folder / "members"):
            members = self.members()
            self._check_claim(request, members, again)
            if (problem := certificate_problem(self.ca_pem, "ca.pem", now)) is not None:
                raise IdentityError(f"{problem}. Nobody can be admitted.")
            end = parse_certificate(self.ca_pem, "ca.pem").not_valid_after_utc
            member = Member(
                site=request.site,
                public_key=request.public_key,
                fingerprint=request.fingerprint,
                approved=now,
                expires=min(now + timedelta(days=days), end),
            )
            kit = {
                "schema": SCHEMA,
                "federation": self.name,
                "address": self.address,
                "ca": self.ca_pem,
                "site": member.site,
                "public_key": member.public_key,
                "expires": format_time(member.expires),
                "issued": format_time(now),
                "software": software(),
            }
            path = self.folder / "kits" / f"{member.site}.kit.json"
            self._log("rotate" if request.kind == "rotate" else "approve", member, days=days)
            write_json(path, {**kit, "signature": self.sign("kit", kit)})
            write_json(self._member_path(member.site), member.values())
        return member, path

    def _check_claim(self, request: JoinRequest, members: Mapping[str, Member], again: bool) -> None:
        for other in members.values():
            if other.public_key == request.public_key and other.site != request.site:
                raise IdentityError(
                    f"{request.where}: its key is that of {other.site}. Every site makes its own (xfed-client enroll)."
                )
        known = members.get(request.site)
        if known is None:
            if request.kind == "rotate":
                raise IdentityError(
                    f"{request.where}: {request.site} is no member with a key to replace: it must enrol"
                )
            return
        if request.kind == "rotate":
            old = parse_public_key(known.public_key, f"the key of {known.site}")
            verify_json(
                "request", request.signed, request.old_signature, old, f"{request.where} (signature of the old key)"
            )
        if known.revoked is not None:
            if again:
                return
            raise IdentityError(
                f"{known.site} was revoked on {known.revoked:%Y-%m-%d} ({known.reason}): to admit it nevertheless, add --again"
            )
        if known.public_key == request.public_key:
            raise IdentityError(
                f"{known.site} is a member with this key until {known.expires:%Y-%m-%d}; its kit is in {self.folder / 'kits'}. "
                "For a longer membership it sends a rotation (xfed-client enroll --rotate)."
            )
        if request.kind != "rotate":
            raise IdentityError(
                f"{request.where}: {known.site} is a member with another key ({known.fingerprint}). If that site lost its key, "
                f"revoke it first (xfed-server revoke {known.site} --reason ...), then approve with --again; if it wants a new "
                "key, it sends a rotation (xfed-client enroll --rotate)."
            )

    def revoke(self, site: str, reason: str, now: datetime | None = None) -> Member:
        """End a membership at once; a second time changes nothing. Raises `IdentityError`."""
        if not reason.strip() or not reason.isprintable():
            raise IdentityError("say why in one line: the reason is kept in membership.jsonl")
        with exclusive(self.folder / "members"):
            members = self.members()
            if site not in members:
                raise IdentityError(f"{site!r:.80} is no member; the members are {', '.join(members) or 'none yet'}")
            known = members[site]
            if known.revoked is not None:
                return known
            member = replace(known, revoked=now or utc_now(), reason=reason.strip())
            self._log("revoke", member, reason=member.reason)
            write_json(self._member_path(site), member.values())
        return member

    def renew(self, *, also: tuple[str, ...] = (), fresh: bool = False, now: datetime | None = None) -> datetime:
        """Write a new TLS certificate, for `also` more hosts, with a `fresh` key if asked; returns its last moment.

        The running coordinator uses it after a restart; sites need nothing new. Raises `IdentityError`.
        """
        with exclusive(self.folder / "members"):
            names = tuple(dict.fromkeys((*self.names, *map(_host, also))))
            if fresh or not self.server_key.exists():
                # a kill between the two files leaves no pair; `check_server` says so, and the next renewal makes one
                made = self.folder / "server.key.new"
                made.unlink(missing_ok=True)
                new_key(made, tls=True)
                made.replace(self.server_key)
            key, ca_key = load_private_key(self.server_key), load_private_key(self.folder / "ca.key")
            pem = new_server_certificate(key.public_key(), names, ca_key, self.ca_pem, now or utc_now())
            write_text(self.server_cert, pem)
            values = json.loads((self.folder / "federation.json").read_text(encoding="utf-8"))
            write_json(self.folder / "federation.json", {**values, "names": list(names)})
            end = parse_certificate(pem, "server.pem").not_valid_after_utc
            self._log("renew", names=list(names), expires=format_time(end))
        return end

    def check_server(self, now: datetime | None = None) -> None:
        """Return only when the TLS certificate can be served now. Raises `IdentityError` with the command to run."""
        now = now or utc_now()
        pem = _read_text(self.server_cert)
        problem = certificate_problem(self.ca_pem, "ca.pem", now) or certificate_problem(pem, "server.pem", now)
        key = load_private_key(self.server_key).public_key() if self.server_key.exists() else None
        if problem is None and parse_certificate(pem, "server.pem").public_key() != key:
            problem = f"{self.server_cert} and {self.server_key} are no pair"
        if problem is not None:
            raise IdentityError(f"{problem}. Run xfed-server renew --dir {self.folder}")

    def warnings(self, now: datetime | None = None) -> list[str]:
        """What expires within 30 days or has expired, each with what to do."""
        now, lines = now or utc_now(), []
        end = parse_certificate(self.ca_pem, "ca.pem").not_valid_after_utc
        if end - now < WARN:
            lines.append(
                f"the federation's certificate {_until(end, now)}: found a new federation and enrol all sites again"
            )
        end = parse_certificate(_read_text(self.server_cert), "server.pem").not_valid_after_utc
        if end - now < WARN:
            lines.append(f"the coordinator's certificate {_until(end, now)}: xfed-server renew --dir {self.folder}")
        for member in self.members().values():
            if member.revoked is None and member.expires - now < WARN:
                lines.append(
                    f"the membership of {member.site} {_until(member.expires, now)}: the site runs xfed-client enroll --rotate, "
                    f"then here xfed-server approve REQUEST --dir {self.folder}"
                )
        return lines

    def _member_path(self, site: str) -> Path:
        return self.folder / "members" / f"{check_site_name(site)}.json"

    def _log(self, kind: str, member: Member | None = None, **fields: Any) -> None:
        who = {} if member is None else {"site": member.site, "fingerprint": member.fingerprint}
        Journal(self.folder / "membership.jsonl").write(kind, by=_operator(), **who, **fields)


def found_federation(
    folder: Path, *, name: str, address: str, also: tuple[str, ...] = (), now: datetime | None = None
) -> Federation:
    """Make a federation's keys and certificates in a new folder (mode 0700). Raises `IdentityError` when it is there already."""
    now = now or utc_now()
    check_federation_name(name)
    host, _ = parse_address(address)
    names = tuple(dict.fromkeys((_host(host), *map(_host, also))))
    if folder.exists() or folder.is_symlink():
        raise IdentityError(
            f"{folder} exists: found a federation in a folder that does not (--dir), so that no key is lost"
        )
    whole = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    with translate_os_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        whole.mkdir(mode=0o700)
        try:
            for inner in ("members", "kits", "runs"):
                (whole / inner).mkdir()
            ca_key, server_key = new_key(whole / "ca.key"), new_key(whole / "server.key", tls=True)
            ca_pem = new_authority(name, ca_key, now)
            write_text(whole / "ca.pem", ca_pem)
            pem = new_server_certificate(server_key.public_key(), names, ca_key, ca_pem, now)
            write_text(whole / "server.pem", pem)
            values = {
                "schema": SCHEMA,
                "name": name,
                "address": address,
                "names": list(names),
                "created": format_time(now),
            }
            write_json(whole / "federation.json", values)
            Journal(whole / "membership.jsonl").write(
                "init", by=_operator(), federation=name, address=address, ca=certificate_fingerprint(ca_pem)
            )
            whole.rename(folder)
        finally:
            remove_tree(whole)
    return load_federation(folder)


def load_federation(folder: Path) -> Federation:
    """The federation of a folder. Raises `IdentityError` when the folder holds none, or a damaged one."""
    path = folder / "federation.json"
    if not path.is_file():
        raise IdentityError(
            f"{folder} holds no federation (federation.json): found one with xfed-server init --dir {folder}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        name, address, names = values["name"], values["address"], tuple(values["names"])
        if values["schema"] != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        parse_address(address)
        for host in names:
            parse_host(host)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IdentityError(f"{path} is damaged ({error}): restore it from a backup") from error
    ca_pem = _read_text(folder / "ca.pem")
    parse_authority(ca_pem, check_federation_name(name), str(folder / "ca.pem"))
    return Federation(folder=folder, name=name, address=address, names=names, ca_pem=ca_pem)


def _host(text: str) -> str:
    return str(parse_host(text).value)


def _until(end: datetime, now: datetime) -> str:
    return f"{'expired' if end <= now else 'expires'} on {end:%Y-%m-%d}"


def _operator() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's number without a name
        return "unknown"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise IdentityError(f"{path} cannot be read ({error}): restore it from a backup") from error


def _read_member(path: Path) -> Member:
    where = f"{path.parent.name}/{path.name}"
    try:
        values = json.loads(_read_text(path))
        revoked = values["revoked"]
        member = Member(
            site=check_site_name(values["site"]),
            public_key=values["public_key"],
            fingerprint=fingerprint(values["public_key"]),
            approved=parse_time(values["approved"], where),
            expires=parse_time(values["expires"], where),
            revoked=None if revoked is None else parse_time(revoked, where),
            reason=str(values["reason"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IdentityError(f"{where} is damaged ({error}): restore it from a backup") from error
    if member.site != path.stem or member.values() != values:
        raise IdentityError(f"{where} is not as xfed wrote it: restore it from a backup")
    return member
