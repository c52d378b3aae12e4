"""What travels by hand or is approved by hand: a site's request, the coordinator's kit, and the plan of a study.

::

    request.json (site) --carried--> coordinator --> <site>.kit.json --carried--> site
    Study + members + bundle --new_plan--> Plan --text, signature--> verify_plan at each site --> approved by its digest
    bytes --parse_form: bounded, strict JSON--> exactly the fields of a `Form` | IdentityError

Nothing here is written to disk. A plan has one spelling (canonical JSON, every field of the study), so its digest names one
study, one list of sites and their keys, and one version of the exchanged messages; a plan spelt otherwise is refused even when
it is signed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from xfed.common.config import NOT_IN_DIGEST, Sites, Study, parse_study
from xfed.common.errors import ConfigError, IdentityError
from xfed.common.identity import (
    SCHEMA,
    canonical_json,
    check_site_name,
    fingerprint,
    format_time,
    parse_authority,
    parse_public_key,
    parse_time,
    read_bounded,
    software,
    utc_now,
    verify_bytes,
    verify_json,
)

__all__ = [
    "KIT",
    "PLAN",
    "REQUEST",
    "Form",
    "JoinRequest",
    "Plan",
    "check_federation_name",
    "differences",
    "new_plan",
    "parse_form",
    "parse_plan",
    "plan_differences",
    "read_form",
    "read_request",
    "verify_plan",
]

REQUEST_LIFE, CLOCK_SLACK = timedelta(days=30), timedelta(days=1)
_FEDERATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a file that travels must hold: these fields, all of them, of these types, and no others."""

    kind: str
    fields: Mapping[str, type]
    optional: frozenset[str] = field(default_factory=frozenset)
    limit: int = 65_536


def _texts(*names: str) -> dict[str, type]:
    return {"schema": int, **dict.fromkeys(names, str)}


REQUEST = Form(
    kind="request",
    fields=_texts("kind", "site", "public_key", "software", "created", "nonce", "signature", "old_signature"),
    optional=frozenset({"old_signature"}),
)
KIT = Form(
    kind="kit",
    fields=_texts("federation", "address", "ca", "site", "public_key", "expires", "issued", "software", "signature"),
)
PLAN = Form(
    kind="plan",
    fields={**_texts("federation", "study_digest", "bundle", "software"), "study": dict, "members": dict},
    limit=1_000_000,
)


def read_form(path: Path, form: Form) -> dict[str, Any]:
    """The fields of a file. Raises `IdentityError` naming the file and what is wrong with it."""
    return parse_form(read_bounded(path, form.limit)[0], form, str(path))


def parse_form(data: bytes, form: Form, where: str) -> dict[str, Any]:
    """The fields of strict JSON: no key twice, no NaN, nothing unknown, nothing missing. Raises `IdentityError`."""
    if len(data) > form.limit:
        raise IdentityError(f"{where} is too long for a {form.kind}: {len(data):,} bytes, at most {form.limit:,}")
    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise IdentityError(f"{where} is not a {form.kind}: it is not JSON ({error!s:.120})") from error
    if not isinstance(values, dict):
        raise IdentityError(f"{where} is not a {form.kind}: it must be a JSON object")
    problems = [f"unknown field {name!r:.60}" for name in sorted(set(values) - set(form.fields))[:5]]
    problems += [f"no field {name!r}" for name in sorted(set(form.fields) - set(values) - form.optional)]
    if not problems and (type(values["schema"]) is not int or values["schema"] != SCHEMA):
        problems.append(f"schema is {values['schema']!r:.20}, not {SCHEMA}")
    if problems:
        raise IdentityError(
            f"{where} is not a {form.kind} that this version reads ({'; '.join(problems)}). "
            f"Both sides must run the same version; this one is {software()}."
        )
    for name, value in values.items():
        if not isinstance(value, form.fields[name]):
            raise IdentityError(f"{where}: {name} is {value!r:.60}, not of type {form.fields[name].__name__}")
        # what is shown to people before they decide must not steer their terminal
        if not all(text.isprintable() for text in _strings(value.split("\n") if isinstance(value, str) else value)):
            raise IdentityError(f"{where}: {name} holds characters that cannot be printed")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a field is there twice")
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


@dataclass(frozen=True, kw_only=True)
class JoinRequest:
    """What a site sent. Whoever wrote it holds the private key of `public_key`; who that is, people must compare."""

    where: str
    kind: str
    site: str
    public_key: str
    fingerprint: str
    software: str
    created: datetime
    signed: Mapping[str, Any]
    old_signature: str


def read_request(path: Path, now: datetime | None = None) -> JoinRequest:
    """A site's request. Raises `IdentityError`: not signed by its own key, too old, not a request."""
    now, where = now or utc_now(), str(path)
    values = read_form(path, REQUEST)
    site, public_key = check_site_name(values["site"]), values["public_key"]
    key = parse_public_key(public_key, f"{where}: public_key")
    signature, old_signature = values.pop("signature"), values.pop("old_signature", "")
    verify_json("request", values, signature, key, where)
    if values["kind"] not in ("enrol", "rotate") or (values["kind"] == "rotate") != bool(old_signature):
        raise IdentityError(
            f"{where}: kind is {values['kind']!r:.40}; an old signature belongs to 'rotate', none to 'enrol'"
        )
    created = parse_time(values["created"], f"{where}: created")
    if not now - REQUEST_LIFE <= created <= now + CLOCK_SLACK:
        raise IdentityError(
            f"{where} was made on {format_time(created)}, here it is {format_time(now)}: a request is good for "
            f"{REQUEST_LIFE.days} days. Ask {site} for a new one (xfed-client enroll), and compare both clocks."
        )
    return JoinRequest(
        where=where,
        kind=values["kind"],
        site=site,
        public_key=public_key,
        fingerprint=fingerprint(public_key),
        software=values["software"],
        created=created,
        signed=values,
        old_signature=old_signature,
    )


def check_federation_name(name: str) -> str:
    """The name itself. Raises `IdentityError` unless it is 1-64 letters, digits, spaces, dots, hyphens, underscores."""
    if not _FEDERATION.fullmatch(name) or name != name.strip():
        raise IdentityError(
            f"{name!r:.80} is not a federation's name: it must be 1 to 64 letters, digits, spaces and . _ -, "
            "and begin with a letter or digit"
        )
    return name


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A study, who takes part (site -> public key), and the bundle whose messages they exchange. Raises `IdentityError`."""

    federation: str
    study: Study
    members: Mapping[str, str]
    bundle: str
    software: str

    def __post_init__(self) -> None:
        """Refuse a plan that no site could act on."""
        check_federation_name(self.federation)
        for site, key in self.members.items():
            check_site_name(site)
            parse_public_key(key, f"the key of {site}")
        if not self.members:
            raise IdentityError("a plan needs at least one site")
        if len(set(self.members.values())) != len(self.members):
            raise IdentityError("two sites of the plan have the same key")
        if self.study.sites.count != len(self.members):
            raise IdentityError(
                f"the plan names {len(self.members)} sites, its study {self.study.sites.count} (sites.count)"
            )
        if not _DIGEST.fullmatch(self.bundle):
            raise IdentityError(f"the plan's bundle is {self.bundle!r:.80}, not a SHA-256 in hexadecimal")

    def values(self) -> dict[str, Any]:
        """The plan as plain values: what is signed."""
        return {
            "schema": SCHEMA,
            "federation": self.federation,
            "study": self.study.resolved(),
            "study_digest": self.study.digest,
            "members": dict(self.members),
            "bundle": self.bundle,
            "software": self.software,
        }

    @property
    def text(self) -> str:
        """Canonical JSON: the only spelling that sites accept."""
        return canonical_json(self.values()).decode()

    @property
    def digest(self) -> str:
        """Hex SHA-256 of `text`: what a site approves."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def new_plan(study: Study, *, federation: str, members: Mapping[str, str], bundle: str) -> Plan:
    """The plan of `study` for these members (site -> public key). Raises `IdentityError`.

    `study.sites` describes simulated hospitals. Real ones come as they are: the plan's study keeps of that section only the
    number of members, so its digest can differ from the file's. Run `Plan.study`, not the file's.
    """
    if not members:
        raise IdentityError("a plan needs at least one site: admit members first (xfed-server approve)")
    real = study.model_copy(update={"sites": Sites(count=len(members))})
    try:
        real = parse_study(real.resolved(), "the study of the plan")
    except ConfigError as error:
        raise IdentityError(f"this study cannot run with {len(members)} sites. {error}") from error
    return Plan(
        federation=federation, study=real, members=dict(sorted(members.items())), bundle=bundle, software=software()
    )


def parse_plan(text: str, where: str = "the plan") -> Plan:
    """The plan of a text. Raises `IdentityError`: too long, unknown or missing fields, another digest or spelling."""
    try:
        values = parse_form(text.encode(), PLAN, where)
    except UnicodeEncodeError as error:
        raise IdentityError(f"{where} is not a plan: it is not Unicode text") from error
    versions = f"It was made by {values['software']!r:.60}, this is {software()}: both sides must run the same version."
    try:
        study = parse_study(values["study"], where)
    except (ConfigError, RecursionError) as error:
        raise IdentityError(f"{error}\n{versions}") from error
    if values["study_digest"] != study.digest:
        raise IdentityError(f"{where}: its study has not the digest that it states. {versions}")
    for name, key in values["members"].items():
        if not isinstance(key, str):
            raise IdentityError(f"{where}: the key of {name!r:.60} is not text")
    plan = Plan(
        federation=values["federation"],
        study=study,
        members=dict(sorted(values["members"].items())),
        bundle=values["bundle"],
        software=values["software"],
    )
    if plan.text != text:
        raise IdentityError(f"{where} is not spelt as a plan is (every field of the study, canonical JSON). {versions}")
    return plan


def verify_plan(text: str, signature: str, ca_pem: str, federation: str) -> Plan:
    """The plan, if the federation signed exactly this text. Raises `IdentityError` for anything else."""
    if len(text) > PLAN.limit:
        raise IdentityError(f"the plan is too long: {len(text):,} characters, at most {PLAN.limit:,}")
    key = parse_authority(ca_pem, federation, "the federation's certificate")
    verify_bytes("plan", text.encode("utf-8", "surrogatepass"), signature, key, "the plan")
    plan = parse_plan(text)
    if plan.federation != federation:
        raise IdentityError(f"the plan is of the federation {plan.federation!r}, this site belongs to {federation!r}")
    return plan


def differences(before: Any, now: Any, where: str = "", *, skip: frozenset[str] = NOT_IN_DIGEST) -> list[str]:
    """``gan.rounds was 3, is 4`` for each field of plain values that differs; keys in `skip` do not count at any depth."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            line
            for key in {**before, **now}
            if key not in skip
            for line in differences(before.get(key), now.get(key), f"{where}.{key}".lstrip("."), skip=skip)
        ]
    return [] if before == now else [f"{where} was {before!r:.60}, is {now!r:.60}"]


def plan_differences(before: Plan, now: Plan) -> list[str]:
    """What changed between two plans, a line each; empty exactly when their digests are equal."""
    lines = differences(before.study.resolved(), now.study.resolved(), skip=frozenset())
    for site in sorted({**before.members, **now.members}):
        old, new = before.members.get(site), now.members.get(site)
        if old != new:
            lines.append(f"{site} {'joins' if old is None else 'is left out' if new is None else 'has a new key'}")
    for name in ("federation", "bundle", "software"):
        lines += differences(getattr(before, name), getattr(now, name), name)
    return lines
