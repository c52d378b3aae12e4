"""A site's folder: its key, its request to join, and the kit that admitted it.

::

    found_home --> key (0600), key.pub, policy.yaml, then site.json                 (mode 0700; the key never leaves this folder)
    ask_to_enrol --> request.json --carried--> coordinator --carried--> kit
    ask_to_rotate --> key.new, request.json signed by the old and the new key       (the old key stays in use)
    install_kit: the federation's? for this name and this key? not expired? --> kit.json --> ca.pem, key.new becomes key
    load_home --> SiteHome

`kit.json` decides: it is written before the rest. Should a kill come in between, the next `load_home` brings `ca.pem`, `key` and
`site.json` in line with it, so at every moment the folder holds a key that the installed kit admits.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from xfed.common.durable import translate_os_errors, write_json, write_text
from xfed.common.errors import IdentityError
from xfed.common.identity import (
    SCHEMA,
    PrivateKey,
    certificate_fingerprint,
    certificate_problem,
    check_site_name,
    fingerprint,
    format_time,
    load_private_key,
    new_key,
    parse_address,
    parse_authority,
    parse_time,
    public_text,
    sign_json,
    software,
    utc_now,
    verify_json,
)
from xfed.common.plan import KIT, check_federation_name, read_form

__all__ = [
    "Kit",
    "Request",
    "SiteHome",
    "ask_to_enrol",
    "ask_to_rotate",
    "found_home",
    "install_kit",
    "load_home",
    "read_kit",
]

WARN = timedelta(days=30)


@dataclass(frozen=True, kw_only=True)
class Kit:
    """What the coordinator gives an admitted site; `ca` is the federation's certificate (PEM)."""

    federation: str
    address: str
    ca: str
    site: str
    public_key: str
    expires: datetime
    issued: datetime
    software: str
    values: dict[str, Any] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request that was written: the file to send, and the fingerprint to tell the coordinator by telephone."""

    site: str
    kind: str
    path: Path
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class SiteHome:
    """An enrolled site. `address` is the coordinator's host:port, `public_key` one line of OpenSSH."""

    folder: Path
    name: str
    kit: Kit
    private_key: PrivateKey = field(repr=False)

    @property
    def federation(self) -> str:
        """The federation's name."""
        return self.kit.federation

    @property
    def address(self) -> str:
        """Where the coordinator listens, host:port."""
        return self.kit.address

    @property
    def ca_pem(self) -> str:
        """The federation's certificate: it alone vouches for the coordinator and signs plans."""
        return self.kit.ca

    @property
    def ca_path(self) -> Path:
        """The same as a file."""
        return self.folder / "ca.pem"

    @property
    def public_key(self) -> str:
        """The key this site was admitted with."""
        return self.kit.public_key

    @property
    def expires(self) -> datetime:
        """The end of the membership."""
        return self.kit.expires

    @property
    def ca_fingerprint(self) -> str:
        """What to compare with the coordinator by telephone."""
        return certificate_fingerprint(self.kit.ca)

    def warnings(self, now: datetime | None = None) -> list[str]:
        """What ends within 30 days or waits for somebody, each with what to do."""
        now, lines = now or utc_now(), []
        if (self.folder / "key.new").exists():
            lines.append(
                "a new key waits for its kit: send request.json to the coordinator, then xfed-client enroll --kit FILE"
            )
        elif self.expires - now < WARN:
            state = "ended" if self.expires <= now else "ends"
            lines.append(
                f"the membership of {self.name} {state} on {self.expires:%Y-%m-%d}: run xfed-client enroll --rotate "
                f"--dir {self.folder} and send request.json to the coordinator"
            )
        return lines


def found_home(folder: Path, name: str) -> None:
    """Make a site's folder with a key of its own; one that is there is completed, never overwritten. Raises `IdentityError`."""
    check_site_name(name)
    if (folder / "site.json").exists():
        known = _read_site(folder)["name"]
        if known != name:
            raise IdentityError(f"{folder} is the folder of {known}, not of {name}: choose another with --dir")
    with translate_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        if not (folder / "key").exists():
            if (folder / "kit.json").exists():
                raise IdentityError(
                    f"{folder}: a kit is there, but no key. Restore key from a backup, or use another --dir"
                )
            new_key(folder / "key")
    _write_public(folder / "key")
    if not (folder / "policy.yaml").exists():
        from xfed.client.policy import default_policy_text  # only needed here

        write_text(folder / "policy.yaml", default_policy_text())
    if not (folder / "site.json").exists():
        write_json(folder / "site.json", {"schema": SCHEMA, "name": name, "federation": None, "share_examples": False})


def ask_to_enrol(folder: Path, *, again: bool = False, now: datetime | None = None) -> Request:
    """Write the request of a new site; `again` also when a kit is installed (after a revocation). Raises `IdentityError`."""
    _read_site(folder)
    if (folder / "kit.json").exists() and not again:
        kit = read_kit(folder / "kit.json")
        raise IdentityError(
            f"{folder} is enrolled in {kit.federation} until {kit.expires:%Y-%m-%d}. For a new key: --rotate; "
            "if the coordinator revoked this site and asks for a new request: --again"
        )
    return _write_request(folder, "enrol", load_private_key(folder / "key"), None, now)


def ask_to_rotate(folder: Path, now: datetime | None = None) -> Request:
    """Make a new key beside the present one, and write a request that both signed. Raises `IdentityError`."""
    home = load_home(folder, even_expired=True)
    path = folder / "key.new"
    if not path.exists():
        new_key(path)
    _write_public(path)
    return _write_request(folder, "rotate", load_private_key(path), home.private_key, now)


def _write_request(
    folder: Path, kind: str, key: PrivateKey, old_key: PrivateKey | None, now: datetime | None
) -> Request:
    public = public_text(key.public_key())
    values: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": kind,
        "site": _read_site(folder)["name"],
        "public_key": public,
        "software": software(),
        "created": format_time(now or utc_now()),
        "nonce": secrets.token_hex(16),
    }
    signatures = {"signature": sign_json("request", values, key)}
    if old_key is not None:
        signatures["old_signature"] = sign_json("request", values, old_key)
    write_json(folder / "request.json", {**values, **signatures})
    return Request(site=values["site"], kind=kind, path=folder / "request.json", fingerprint=fingerprint(public))


def read_kit(path: Path) -> Kit:
    """A kit that the federation named in it signed. Raises `IdentityError`. Whether it is ours, and still good, is not asked."""
    values, where = read_form(path, KIT), str(path)
    content = {name: value for name, value in values.items() if name != "signature"}
    federation = check_federation_name(values["federation"])
    authority = parse_authority(values["ca"], federation, f"{where}: ca")
    verify_json("kit", content, values["signature"], authority, where)
    parse_address(values["address"])
    return Kit(
        federation=federation,
        address=values["address"],
        ca=values["ca"],
        site=check_site_name(values["site"]),
        public_key=values["public_key"],
        expires=parse_time(values["expires"], f"{where}: expires"),
        issued=parse_time(values["issued"], f"{where}: issued"),
        software=values["software"],
        values=values,
    )


def install_kit(folder: Path, path: Path, *, again: bool = False, now: datetime | None = None) -> SiteHome:
    """Take a kit into use. Raises `IdentityError`: forged, for another site or key, expired, or of another federation.

    The first kit is trusted as it came: compare `SiteHome.ca_fingerprint` with the coordinator. After that the federation's
    certificate is fixed, unless `again`.
    """
    now, name, kit = now or utc_now(), _read_site(folder)["name"], read_kit(path)
    if kit.site != name:
        raise IdentityError(f"{path} is the kit of {kit.site}, this site is {name}")
    ours = [each for each in (folder / "key", folder / "key.new") if each.exists()]
    if kit.public_key not in [public_text(load_private_key(each).public_key()) for each in ours]:
        raise IdentityError(
            f"{path} was made for another key than this site's. Send request.json to the coordinator again, "
            "and install the kit that it answers with."
        )
    problem = certificate_problem(kit.ca, f"the federation's certificate in {path}", now)
    if problem is None and kit.expires <= now:
        problem = f"{path} expired on {format_time(kit.expires)}"
    if problem is not None:
        raise IdentityError(f"{problem}. Ask the coordinator for a new kit.")
    if (folder / "kit.json").exists() and not again:
        before = read_kit(folder / "kit.json")
        if before.ca != kit.ca:
            raise IdentityError(
                f"{path} is of another federation than the one installed: {kit.federation} with certificate "
                f"{certificate_fingerprint(kit.ca)}, installed is {before.federation} with {certificate_fingerprint(before.ca)}. "
                "Telephone the coordinator; if both of you mean it, add --again."
            )
    write_json(folder / "kit.json", kit.values)
    return load_home(folder, now=now)


def load_home(folder: Path, *, now: datetime | None = None, even_expired: bool = False) -> SiteHome:
    """The site of a folder, after finishing what a kill interrupted. Raises `IdentityError`: not enrolled, damaged, expired."""
    name = _read_site(folder)["name"]
    if not (folder / "kit.json").exists():
        raise IdentityError(
            f"{folder}: {name} is not enrolled yet. Send request.json to the coordinator, then run "
            f"xfed-client enroll --kit FILE --dir {folder}"
        )
    kit = read_kit(folder / "kit.json")
    if kit.site != name:
        raise IdentityError(
            f"{folder / 'kit.json'} is the kit of {kit.site}, site.json says {name}: restore what was changed"
        )
    _settle(folder, kit)
    key = load_private_key(folder / "key")
    if public_text(key.public_key()) != kit.public_key:
        raise IdentityError(
            f"{folder / 'key'} is not the key that was admitted. Restore it from a backup, or enrol anew in another --dir"
        )
    now = now or utc_now()
    if kit.expires <= now and not even_expired:
        raise IdentityError(
            f"the membership of {name} ended on {format_time(kit.expires)} (here it is {format_time(now)}). Run "
            f"xfed-client enroll --rotate --dir {folder} and send request.json to the coordinator"
        )
    return SiteHome(folder=folder, name=name, kit=kit, private_key=key)


def _settle(folder: Path, kit: Kit) -> None:
    """Bring the other files in line with kit.json; without a kill before, there is nothing to do."""
    new = folder / "key.new"
    with translate_os_errors(folder):
        if new.exists() and public_text(load_private_key(new).public_key()) == kit.public_key:
            new.replace(folder / "key")
    _write_public(folder / "key")
    if not new.exists():
        (folder / "key.new.pub").unlink(missing_ok=True)
    if _text(folder / "ca.pem") != kit.ca:
        write_text(folder / "ca.pem", kit.ca)
    site = _read_site(folder)
    if site.get("federation") != kit.federation:
        write_json(folder / "site.json", {**site, "federation": kit.federation})


def _write_public(key: Path) -> None:
    text = public_text(load_private_key(key).public_key()) + "\n"
    if _text(key.with_name(f"{key.name}.pub")) != text:
        write_text(key.with_name(f"{key.name}.pub"), text)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _read_site(folder: Path) -> dict[str, Any]:
    path = folder / "site.json"
    if not path.is_file():
        raise IdentityError(
            f"{folder} is not a site's folder: begin with xfed-client enroll --name SITE --dir {folder}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        check_site_name(values["name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IdentityError(f"{path} is damaged ({error}): restore it from a backup") from error
    return dict(values)
