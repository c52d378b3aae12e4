"""How a hospital joins: by files alone, whole after any kill, and refused whenever something is not what it should be."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import socket
import ssl
import stat
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner, Result

import xfed.client.home
import xfed.server.federation
from xfed.client.enrolment_cli import enroll
from xfed.client.home import SiteHome, ask_to_enrol, ask_to_rotate, found_home, install_kit, load_home, read_kit
from xfed.client.policy import load_policy
from xfed.common.durable import exclusive
from xfed.common.errors import ConfigError, IdentityError, StorageError, XfedError
from xfed.common.identity import (
    PrivateKey,
    canonical_json,
    certificate_fingerprint,
    fingerprint,
    format_time,
    load_private_key,
    new_authority,
    new_key,
    parse_certificate,
    public_text,
    sign_json,
    verify_json,
)
from xfed.common.plan import read_request
from xfed.server import federation_cli
from xfed.server.federation import Federation, found_federation, load_federation

NOW = datetime(2030, 1, 31, 12, tzinfo=UTC)
DAY, SECOND = timedelta(days=1), timedelta(seconds=1)


def _found(tmp_path: Path, name: str = "federation") -> Federation:
    return found_federation(tmp_path / name, name="Chest North", address="localhost:9092", also=("127.0.0.1",), now=NOW)


def _ask(folder: Path, name: str = "st-a") -> Path:
    found_home(folder, name)
    return ask_to_enrol(folder, now=NOW).path


def _join(federation: Federation, folder: Path, name: str = "st-a") -> SiteHome:
    _, kit = federation.approve(read_request(_ask(folder, name), NOW), now=NOW)
    return install_kit(folder, kit, now=NOW)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return _found(tmp_path)


@pytest.fixture
def site(tmp_path: Path, federation: Federation) -> Path:
    _join(federation, tmp_path / "site")
    return tmp_path / "site"


# The way it goes


def test_a_hospital_joins_by_two_files(tmp_path: Path, federation: Federation) -> None:
    folder = tmp_path / "site"
    found_home(folder, "st-a")
    asked = ask_to_enrol(folder, now=NOW)
    assert (asked.site, asked.kind, asked.path) == ("st-a", "enrol", folder / "request.json")
    with pytest.raises(IdentityError, match="not enrolled yet"):
        load_home(folder, now=NOW)

    request = read_request(asked.path, NOW)
    assert (request.site, request.kind, request.fingerprint) == ("st-a", "enrol", asked.fingerprint)
    member, kit = federation.approve(request, days=100, expected=asked.fingerprint, now=NOW)
    assert member.expires == NOW + 100 * DAY
    assert kit == federation.folder / "kits" / "st-a.kit.json"

    installed = install_kit(folder, kit, now=NOW)
    home = load_home(folder, now=NOW)
    assert home == installed or home.kit == installed.kit
    assert (home.name, home.federation, home.address) == ("st-a", "Chest North", "localhost:9092")
    assert home.expires == NOW + 100 * DAY
    assert home.public_key == member.public_key == public_text(home.private_key.public_key())
    assert home.ca_pem == federation.ca_pem == home.ca_path.read_text()
    assert home.ca_fingerprint == certificate_fingerprint(federation.ca_pem)
    assert json.loads((folder / "site.json").read_text()) == {
        "schema": 1,
        "name": "st-a",
        "federation": "Chest North",
        "share_examples": False,
    }
    load_policy(folder / "policy.yaml")
    assert list(load_federation(federation.folder).active_members(NOW)) == ["st-a"]


def test_files_are_as_the_architecture_says(tmp_path: Path, federation: Federation, site: Path) -> None:
    request = json.loads((site / "request.json").read_text())
    signature = request.pop("signature")
    assert set(request) == {"schema", "kind", "site", "public_key", "software", "created", "nonce"}
    member = federation.members()["st-a"]
    verify_json("request", request, signature, load_private_key(site / "key").public_key())
    kit = json.loads((federation.folder / "kits" / "st-a.kit.json").read_text())
    signature = kit.pop("signature")
    assert set(kit) == {"schema", "federation", "address", "ca", "site", "public_key", "expires", "issued", "software"}
    verify_json("kit", kit, signature, load_private_key(federation.folder / "ca.key").public_key())
    assert json.loads((federation.folder / "members" / "st-a.json").read_text()) == {
        "schema": 1,
        "site": "st-a",
        "public_key": kit["public_key"],
        "fingerprint": fingerprint(kit["public_key"]),
        "approved": format_time(NOW),
        "expires": format_time(NOW + 365 * DAY),
        "revoked": None,
        "reason": "",
    }
    assert json.loads((federation.folder / "federation.json").read_text()) == {
        "schema": 1,
        "name": "Chest North",
        "address": "localhost:9092",
        "names": ["localhost", "127.0.0.1"],
        "created": format_time(NOW),
    }
    key = serialization.load_pem_public_key(member.public_pem)
    assert key == load_private_key(site / "key").public_key()
    assert federation.admitted_keys(NOW) == {member.public_pem}


def test_secrets_are_for_their_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        federation = _found(tmp_path)
        (tmp_path / "site").mkdir(mode=0o777)  # an import may have made it
        _join(federation, tmp_path / "site")
        ask_to_rotate(tmp_path / "site", now=NOW)
        federation.renew(fresh=True, now=NOW)
    finally:
        os.umask(before)
    assert _mode(federation.folder) == _mode(tmp_path / "site") == 0o700
    secrets = ["federation/ca.key", "federation/server.key", "site/key", "site/key.new"]
    assert [_mode(tmp_path / secret) for secret in secrets] == [0o600] * 4
    # and no file that others may read is a secret
    for path in tmp_path.rglob("*"):
        if path.is_file() and str(path.relative_to(tmp_path)) not in secrets:
            assert b"PRIVATE KEY" not in path.read_bytes(), path


def _spellings(key: PrivateKey) -> Iterator[bytes]:
    number = key.private_numbers().private_value
    raw = number.to_bytes(48, "big")
    yield from (raw, raw.hex().encode(), raw.hex().upper().encode(), str(number).encode())
    for cut in range(3):  # base64 spells the same bytes in three ways, by where they begin
        yield base64.b64encode(b"\0" * cut + raw)[4:60]
    for form in (serialization.PrivateFormat.OpenSSH, serialization.PrivateFormat.PKCS8):
        pem = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
        yield from (line for line in pem.splitlines()[-4:-1] if len(line) > 30)


def test_private_keys_are_in_nothing_that_travels_or_is_logged(tmp_path: Path) -> None:
    run = _Commands(tmp_path)
    shown = run("init", "--name", "Chest North", "--address", "localhost:9092").output
    shown += run("enroll", "--name", "st-a").output
    shown += run("approve", "site/request.json", "--yes").output
    shown += run("enroll", "--kit", "federation/kits/st-a.kit.json").output
    keys = [load_private_key(tmp_path / "site/key")]
    first = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    shown += run("enroll", "--rotate").output
    shown += run("approve", "site/request.json", "--yes").output
    shown += run("enroll", "--kit", "federation/kits/st-a.kit.json").output
    keys += [load_private_key(tmp_path / name) for name in ("site/key", "federation/ca.key", "federation/server.key")]
    last = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    travelled = [shown.encode()]
    travelled += [data for files in (first, last) for path, data in files.items() if path.name not in _SECRET]
    assert len(travelled) > 20
    for key in keys:
        spellings = list(_spellings(key))
        assert any(each in data for files in (first, last) for data in files.values() for each in spellings)
        assert not any(each in data for data in travelled for each in spellings)


_SECRET = {"key", "key.new", "ca.key", "server.key"}


# Founding


def test_a_federation_is_never_founded_over_anything(tmp_path: Path, federation: Federation) -> None:
    before = (federation.folder / "ca.key").read_bytes()
    for name in ("federation", "empty", "dangling"):
        if name == "empty":
            (tmp_path / name).mkdir()
        if name == "dangling":
            (tmp_path / name).symlink_to(tmp_path / "nowhere")
        with pytest.raises(IdentityError, match="exists"):
            _found(tmp_path, name)
    assert (federation.folder / "ca.key").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "../x"}, "federation's name"),
        ({"name": ""}, "federation's name"),
        ({"address": "localhost"}, "HOST:PORT"),
        ({"address": "0.0.0.0:1"}, "no address"),
        ({"also": ("*.org",)}, "neither"),
    ],
)
def test_a_federation_with_bad_names_is_not_founded(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    values: dict[str, Any] = {"name": "Chest North", "address": "localhost:9092", "now": NOW, **change}
    with pytest.raises(IdentityError, match=words):
        found_federation(tmp_path / "federation", **values)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_federation_or_a_damaged_one_is_refused(tmp_path: Path, federation: Federation) -> None:
    with pytest.raises(IdentityError, match="xfed-server init"):
        load_federation(tmp_path)
    path = federation.folder / "federation.json"
    good = json.loads(path.read_text())
    for bad in (
        "",
        "[]",
        json.dumps({**good, "schema": 2}),
        json.dumps({**good, "address": 1}),
        json.dumps({"schema": 1}),
    ):
        path.write_text(bad)
        with pytest.raises(IdentityError):
            load_federation(federation.folder)
    path.write_text(json.dumps({**good, "name": "Chest South"}))
    with pytest.raises(IdentityError, match="Chest South"):
        load_federation(federation.folder)
    path.write_text(json.dumps(good))
    (federation.folder / "ca.pem").write_text("x")
    with pytest.raises(IdentityError, match="PEM"):
        load_federation(federation.folder)


@pytest.mark.parametrize("name", ["../st-a", "st/a", "St-A", "", "a" * 64, ".", "st-a\n", "-a"])
def test_a_site_with_a_bad_name_is_not_founded(tmp_path: Path, name: str) -> None:
    with pytest.raises(IdentityError, match="not a site's name"):
        found_home(tmp_path / "site", name)
    assert not (tmp_path / "site").exists()


def test_founding_a_site_again_keeps_everything(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    found_home(folder, "st-a")
    (folder / "policy.yaml").write_text("# ours\n")
    (folder / "key.pub").unlink()
    key = (folder / "key").read_bytes()
    found_home(folder, "st-a")
    assert (folder / "key").read_bytes() == key
    assert (folder / "policy.yaml").read_text() == "# ours\n"
    assert (folder / "key.pub").read_text().strip() == public_text(load_private_key(folder / "key").public_key())
    with pytest.raises(IdentityError, match="folder of st-a"):
        found_home(folder, "st-b")
    (folder / "site.json").write_text("{}")
    with pytest.raises(IdentityError, match="damaged"):
        found_home(folder, "st-a")
    with pytest.raises(IdentityError, match="not a site's folder"):
        ask_to_enrol(tmp_path / "nowhere")


def test_a_lost_key_is_not_quietly_replaced(site: Path) -> None:
    (site / "key").unlink()
    with pytest.raises(IdentityError, match="no key"):
        found_home(site, "st-a")
    with pytest.raises(IdentityError):
        load_home(site, now=NOW)


# Requests


def _resign(path: Path, key: PrivateKey, **changes: Any) -> Path:
    """The request of `path` with other values, signed anew by `key`."""
    values = {**json.loads(path.read_text()), **changes}
    signatures = {name: values.pop(name) for name in ("signature", "old_signature") if name in values}
    path.write_text(json.dumps({**values, **signatures, "signature": sign_json("request", values, key)}))
    return path


@pytest.mark.parametrize("name", ["kind", "site", "public_key", "software", "created", "nonce", "signature"])
def test_a_request_that_was_changed_is_refused(tmp_path: Path, name: str) -> None:
    path = _ask(tmp_path / "site")
    values = json.loads(path.read_text())
    other = public_text(ec.generate_private_key(ec.SECP384R1()).public_key())
    instead = {"kind": "rotate", "site": "st-b", "public_key": other, "created": format_time(NOW + SECOND)}
    path.write_text(json.dumps({**values, name: instead.get(name, "AAAA")}))
    with pytest.raises(IdentityError, match="signature does not fit"):
        read_request(path, NOW)
    path.write_text(json.dumps({key: value for key, value in values.items() if key != name}))
    with pytest.raises(IdentityError, match=f"no field '{name}'"):
        read_request(path, NOW)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"site": "../../etc/x"}, "not a site's name"),
        ({"site": "st-a\n"}, "not a site's name"),
        ({"kind": "admit"}, "kind is 'admit'"),
        ({"kind": "rotate"}, "old signature"),
        ({"created": "yesterday"}, "not a time"),
        ({"schema": 2}, "schema is 2"),
        ({"shell": "rm"}, "unknown field"),
        ({"software": "\x1b[2J"}, "cannot be printed"),
        ({"software": 1}, "not of type str"),
        ({"nonce": "x" * 70_000}, "too long"),
    ],
)
def test_a_request_with_wrong_values_is_refused_though_well_signed(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    path = _ask(tmp_path / "site")
    _resign(path, load_private_key(tmp_path / "site/key"), **changes)
    with pytest.raises(IdentityError, match=words):
        read_request(path, NOW)


def test_a_request_is_good_for_thirty_days(tmp_path: Path, federation: Federation) -> None:
    path = _ask(tmp_path / "site")
    read_request(path, NOW + 30 * DAY)
    read_request(path, NOW - DAY)
    for moment in (NOW + 30 * DAY + SECOND, NOW - DAY - SECOND):
        with pytest.raises(IdentityError, match="good for 30 days"):
            read_request(path, moment)
    with pytest.raises(IdentityError, match="cannot be read"):
        read_request(tmp_path / "none", NOW)


def test_the_fingerprint_that_was_told_decides(tmp_path: Path, federation: Federation) -> None:
    request = read_request(_ask(tmp_path / "site"), NOW)
    with pytest.raises(IdentityError, match="Do not admit it"):
        federation.approve(request, expected="SHA256:" + "A" * 43, now=NOW)
    assert federation.members() == {}
    assert not list((federation.folder / "kits").iterdir())
    federation.approve(request, expected=request.fingerprint, now=NOW)


def test_a_name_and_a_key_belong_to_one_site(tmp_path: Path, federation: Federation, site: Path) -> None:
    with pytest.raises(IdentityError, match="member with this key until 2031-01-31"):
        federation.approve(read_request(site / "request.json", NOW), now=NOW)
    with pytest.raises(IdentityError, match="member with another key"):
        federation.approve(read_request(_ask(tmp_path / "impostor"), NOW), again=True, now=NOW)
    (tmp_path / "twin").mkdir()
    (tmp_path / "twin/key").write_bytes((site / "key").read_bytes())
    (tmp_path / "twin/key").chmod(0o600)
    with pytest.raises(IdentityError, match="its key is that of st-a"):
        federation.approve(read_request(_ask(tmp_path / "twin", "st-b"), NOW), now=NOW)
    assert list(federation.members()) == ["st-a"]


# Kits


def _seal(federation: Federation, path: Path, **changes: Any) -> Path:
    """The kit of `path` with other values, signed anew by the federation."""
    values = {name: value for name, value in {**json.loads(path.read_text()), **changes}.items() if name != "signature"}
    path.write_text(json.dumps({**values, "signature": federation.sign("kit", values)}))
    return path


@pytest.fixture
def kit(tmp_path: Path, federation: Federation) -> Path:
    return federation.approve(read_request(_ask(tmp_path / "site"), NOW), now=NOW)[1]


@pytest.mark.parametrize(
    "name", ["federation", "address", "ca", "site", "public_key", "expires", "issued", "software", "signature"]
)
def test_a_kit_that_was_changed_is_refused(tmp_path: Path, kit: Path, name: str) -> None:
    values = json.loads(kit.read_text())
    other_ca = new_authority("Chest North", ec.generate_private_key(ec.SECP384R1()), NOW)
    instead = {"ca": other_ca, "expires": format_time(NOW + 9999 * DAY), "address": "evil.example.org:1"}
    kit.write_text(json.dumps({**values, name: instead.get(name, "st-b")}))
    with pytest.raises(
        IdentityError, match="certificate of the federation" if name == "federation" else "does not fit"
    ):
        install_kit(tmp_path / "site", kit, now=NOW)
    kit.write_text(json.dumps({key: value for key, value in values.items() if key != name}))
    with pytest.raises(IdentityError, match=f"no field '{name}'"):
        install_kit(tmp_path / "site", kit, now=NOW)
    assert not {"kit.json", "ca.pem"} & {path.name for path in (tmp_path / "site").iterdir()}


def test_a_kit_for_somebody_else_is_refused(tmp_path: Path, federation: Federation, kit: Path) -> None:
    text = kit.read_text()
    other = public_text(ec.generate_private_key(ec.SECP384R1()).public_key())
    for changes, words in (
        ({"site": "st-b"}, "kit of st-b"),
        ({"public_key": other}, "another key"),
        ({"site": "../x"}, "not a site's name"),
        ({"address": "evil"}, "HOST:PORT"),
        ({"expires": "never"}, "not a time"),
        ({"ca": (federation.folder / "server.pem").read_text()}, "not signed by itself"),
        ({"extra": "x"}, "unknown field"),
    ):
        with pytest.raises(IdentityError, match=words):
            install_kit(tmp_path / "site", _seal(federation, kit, **changes), now=NOW)
        kit.write_text(text)
        assert not (tmp_path / "site/kit.json").exists()
    install_kit(tmp_path / "site", kit, now=NOW)


def test_an_expired_kit_is_refused_and_so_is_a_home_whose_membership_ended(tmp_path: Path, kit: Path) -> None:
    folder, end = tmp_path / "site", NOW + 365 * DAY
    with pytest.raises(IdentityError, match="expired on 2031-01-31"):
        install_kit(folder, kit, now=end)
    with pytest.raises(IdentityError, match="clock"):
        install_kit(folder, kit, now=NOW - 2 * DAY)
    install_kit(folder, kit, now=end - SECOND)
    assert load_home(folder, now=end - SECOND).expires == end
    with pytest.raises(IdentityError, match="enroll --rotate"):
        load_home(folder, now=end)
    assert load_home(folder, now=end, even_expired=True).name == "st-a"


def test_another_federation_needs_to_be_meant(tmp_path: Path, site: Path) -> None:
    other = _found(tmp_path, "other")  # of the same name, with another certificate
    request = ask_to_enrol(site, again=True, now=NOW)
    kit = other.approve(read_request(request.path, NOW), now=NOW)[1]
    before = {path.name: path.read_bytes() for path in site.iterdir() if path.is_file()}
    with pytest.raises(IdentityError, match="another federation") as caught:
        install_kit(site, kit, now=NOW)
    assert certificate_fingerprint(other.ca_pem) in str(caught.value)
    assert {path.name: path.read_bytes() for path in site.iterdir() if path.is_file()} == before
    assert install_kit(site, kit, again=True, now=NOW).ca_pem == other.ca_pem
    assert (site / "ca.pem").read_text() == other.ca_pem


def test_enrolling_twice_needs_to_be_meant(site: Path) -> None:
    with pytest.raises(IdentityError, match="--rotate"):
        ask_to_enrol(site, now=NOW)
    assert ask_to_enrol(site, again=True, now=NOW).kind == "enrol"


def test_a_home_whose_files_do_not_fit_is_refused(tmp_path: Path, federation: Federation, site: Path) -> None:
    _join(federation, tmp_path / "other", "st-b")
    key, kit = (site / "key").read_bytes(), (site / "kit.json").read_bytes()
    (site / "key").write_bytes((tmp_path / "other/key").read_bytes())
    with pytest.raises(IdentityError, match="not the key that was admitted"):
        load_home(site, now=NOW)
    (site / "key").write_bytes(key)
    (site / "kit.json").write_bytes((tmp_path / "other/kit.json").read_bytes())
    with pytest.raises(IdentityError, match="kit of st-b"):
        load_home(site, now=NOW)
    (site / "kit.json").write_bytes(kit.replace(b"localhost", b"elsewhere"))
    with pytest.raises(IdentityError, match="does not fit"):
        load_home(site, now=NOW)
    (site / "kit.json").write_bytes(kit)
    (site / "key").chmod(0o644)
    with pytest.raises(IdentityError, match="chmod 600"):
        load_home(site, now=NOW)


# A new key


def test_a_key_is_replaced_with_the_word_of_the_old_one(federation: Federation, site: Path) -> None:
    old = load_home(site, now=NOW).public_key
    asked = ask_to_rotate(site, now=NOW)
    assert asked.kind == "rotate"
    assert ask_to_rotate(site, now=NOW).fingerprint == asked.fingerprint  # asking again is the same request
    assert load_home(site, now=NOW).public_key == old  # in use until the kit comes
    assert "waits for its kit" in load_home(site, now=NOW).warnings(NOW)[0]
    request = read_request(asked.path, NOW)
    member, kit = federation.approve(request, now=NOW + DAY)
    assert member.public_key == request.public_key != old
    home = install_kit(site, kit, now=NOW + DAY)
    assert home.public_key == member.public_key == public_text(home.private_key.public_key())
    assert home.expires == NOW + 366 * DAY
    assert home.warnings(NOW + DAY) == []
    assert not {"key.new", "key.new.pub"} & {path.name for path in site.iterdir()}
    assert (site / "key.pub").read_text().strip() == home.public_key
    assert federation.admitted_keys(NOW + DAY) == {member.public_pem}
    # and what worked once does not work again
    with pytest.raises(IdentityError, match="signature of the old key"):
        federation.approve(request, now=NOW + DAY)


def test_a_rotation_that_the_present_key_did_not_sign_is_refused(
    tmp_path: Path, federation: Federation, site: Path
) -> None:
    path = ask_to_rotate(site, now=NOW).path
    values = json.loads(path.read_text())
    content = {name: value for name, value in values.items() if "signature" not in name}
    new, stranger = load_private_key(site / "key.new"), ec.generate_private_key(ec.SECP384R1())
    for other in (
        sign_json("request", content, new),
        sign_json("request", content, stranger),
        sign_json("kit", content, load_private_key(site / "key")),
        sign_json("request", {**content, "nonce": "0"}, load_private_key(site / "key")),
        "AAAA",
    ):
        path.write_text(json.dumps({**values, "old_signature": other}))
        with pytest.raises(IdentityError, match="signature of the old key"):
            federation.approve(read_request(path, NOW), now=NOW)
    # revoked and --again do not weaken it
    federation.revoke("st-a", "test", NOW)
    with pytest.raises(IdentityError, match="signature of the old key"):
        federation.approve(read_request(path, NOW), again=True, now=NOW)
    path.write_text(json.dumps(values))
    assert federation.approve(read_request(path, NOW), again=True, now=NOW)[0].public_key == values["public_key"]


def test_only_a_member_can_rotate(tmp_path: Path, federation: Federation) -> None:
    other = _found(tmp_path, "other")
    _join(other, tmp_path / "site")
    with pytest.raises(IdentityError, match="must enrol"):
        federation.approve(read_request(ask_to_rotate(tmp_path / "site", NOW).path, NOW), now=NOW)
    found_home(tmp_path / "new", "st-b")
    with pytest.raises(IdentityError, match="not enrolled yet"):
        ask_to_rotate(tmp_path / "new", NOW)


# Membership


def test_a_revocation_counts_at_once_and_is_kept(tmp_path: Path, federation: Federation, site: Path) -> None:
    running = load_federation(federation.folder)
    assert list(running.active_members(NOW)) == ["st-a"]
    federation.revoke("st-a", "laptop stolen", NOW)
    assert running.active_members(NOW) == {}
    assert running.admitted_keys(NOW) == frozenset()
    member = running.members()["st-a"]
    assert (member.state(NOW), member.revoked, member.reason) == ("revoked", NOW, "laptop stolen")
    assert federation.revoke("st-a", "another reason", NOW + DAY) == member
    with pytest.raises(IdentityError, match="no member; the members are st-a"):
        federation.revoke("st-z", "x", NOW)
    for reason in ("", " ", "two\nlines"):
        with pytest.raises(IdentityError, match="say why"):
            federation.revoke("st-a", reason, NOW)
    request = read_request(_ask(tmp_path / "again"), NOW)
    with pytest.raises(IdentityError, match="laptop stolen"):
        federation.approve(request, now=NOW)
    assert federation.approve(request, again=True, now=NOW)[0].state(NOW) == "active"
    assert load_home(site, now=NOW).public_key != running.members()["st-a"].public_key


def test_a_membership_ends_with_its_time(tmp_path: Path, federation: Federation) -> None:
    request = read_request(_ask(tmp_path / "site"), NOW)
    federation.approve(request, days=1, now=NOW)
    assert list(federation.active_members(NOW + DAY - SECOND)) == ["st-a"]
    assert federation.active_members(NOW + DAY) == {}
    assert federation.members()["st-a"].state(NOW + DAY) == "expired"


def test_no_membership_outlives_the_federation(tmp_path: Path, federation: Federation) -> None:
    path = _ask(tmp_path / "site")
    end = parse_certificate(federation.ca_pem, "ca.pem").not_valid_after_utc
    _resign(path, load_private_key(tmp_path / "site/key"), created=format_time(end))
    request = read_request(path, end)
    with pytest.raises(IdentityError, match="Nobody can be admitted"):
        federation.approve(request, now=end)
    assert federation.approve(request, days=365, now=end - DAY)[0].expires == end


def test_everything_is_recorded(tmp_path: Path, federation: Federation, site: Path) -> None:
    federation.approve(read_request(ask_to_rotate(site, NOW).path, NOW), now=NOW)
    federation.revoke("st-a", "study ended", NOW)
    federation.renew(now=NOW)
    lines = [json.loads(line) for line in (federation.folder / "membership.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["init", "approve", "rotate", "revoke", "renew"]
    assert all(datetime.fromisoformat(line["time"]).utcoffset() == timedelta(0) and line["by"] for line in lines)
    assert lines[1]["fingerprint"] != lines[2]["fingerprint"] == lines[3]["fingerprint"]
    assert lines[3]["reason"] == "study ended"


def test_a_damaged_member_file_lets_nobody_in(federation: Federation, site: Path) -> None:
    path = federation.folder / "members/st-a.json"
    good = json.loads(path.read_text())
    other = public_text(ec.generate_private_key(ec.SECP384R1()).public_key())
    for bad in (
        "",
        "[]",
        json.dumps({**good, "site": "st-b"}),
        json.dumps({**good, "public_key": other}),
        json.dumps({**good, "revoked": False}),
        json.dumps({**good, "expires": "2099"}),
        json.dumps({**good, "admin": True}),
        json.dumps({key: value for key, value in good.items() if key != "revoked"}),
    ):
        path.write_text(bad)
        with pytest.raises(IdentityError, match=r"members/st-a\.json|st-a"):
            federation.active_members(NOW)
    path.write_text(json.dumps(good))
    assert federation.active_members(NOW)


def test_two_operators_are_kept_apart(tmp_path: Path, federation: Federation) -> None:
    request = read_request(_ask(tmp_path / "site"), NOW)
    with exclusive(federation.folder / "members"), pytest.raises(StorageError, match="in use"):
        federation.approve(request, now=NOW)
    with exclusive(federation.folder):  # as a running coordinator does
        federation.approve(request, now=NOW)


def test_warnings_come_thirty_days_before(federation: Federation, site: Path) -> None:
    year, server = NOW + 365 * DAY, NOW + 397 * DAY
    assert federation.warnings(year - 30 * DAY) == []
    assert load_home(site, now=NOW).warnings(year - 30 * DAY) == []
    (line,) = federation.warnings(year - 30 * DAY + SECOND)
    assert "membership of st-a expires on 2031-01-31" in line
    assert "xfed-client enroll --rotate" in line
    (line,) = load_home(site, now=NOW).warnings(year - 30 * DAY + SECOND)
    assert "ends on 2031-01-31" in line
    early, late = federation.warnings(server - 30 * DAY), federation.warnings(server - 30 * DAY + SECOND)
    assert not any("coordinator's certificate" in line for line in early)
    assert any("coordinator's certificate expires" in line for line in late)
    lines = federation.warnings(server)
    assert any("coordinator's certificate expired" in line and "xfed-server renew" in line for line in lines)
    assert any("membership of st-a expired" in line for line in lines)
    assert any("found a new federation" in line for line in federation.warnings(NOW + 3640 * DAY))
    federation.revoke("st-a", "x", NOW)
    assert federation.warnings(year) == []


# Killed at any step


class Killed(BaseException):
    """Stands for a kill: no handler of the code under test may swallow it."""


def _kill_at(patch: pytest.MonkeyPatch, module: Any, step: int) -> list[int]:
    """From the `step`-th change on disk that `module` makes, nothing happens any more."""
    count = [0]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] >= step:
                raise Killed
            return function(*args, **kwargs)

        return call

    for name in ("write_json", "write_text", "new_key", "Journal"):
        if hasattr(module, name):
            patch.setattr(module, name, counted(getattr(module, name)))
    for name in ("replace", "rename", "unlink", "chmod"):
        patch.setattr(module.Path, name, counted(getattr(Path, name)))
    return count


def _until_it_lives(module: Any, action: Callable[[], Any], check: Callable[[], Any]) -> int:
    """Run `action` killed at its first, second, ... step; `check` after each kill. Returns the number of kills."""
    for step in range(1, 60):
        with pytest.MonkeyPatch.context() as patch:
            count = _kill_at(patch, module, step)
            with contextlib.suppress(Killed):
                action()
            alive = count[0] < step
        check()
        if alive:
            return step - 1
    raise AssertionError("it never came to its end")


def test_a_kill_while_a_new_key_is_installed_leaves_a_pair_that_works(
    tmp_path: Path, federation: Federation, site: Path
) -> None:
    before = {path.name: path.read_bytes() for path in site.iterdir() if path.is_file()}
    ask_to_rotate(site, NOW)
    pending = {path.name: path.read_bytes() for path in site.iterdir() if path.is_file()}
    kit = federation.approve(read_request(site / "request.json", NOW), now=NOW)[1]
    admitted: set[str] = set()

    def check() -> None:
        assert _mode(site / "key") == 0o600
        home = load_home(site, now=NOW)
        assert public_text(home.private_key.public_key()) == home.public_key
        assert (site / "key.pub").read_text().strip() == home.public_key
        admitted.add(home.public_key)
        # the kit can still be installed, whatever was interrupted
        assert install_kit(site, kit, now=NOW).public_key == read_kit(kit).public_key
        assert not (site / "key.new").exists()
        for path in site.iterdir():
            if path.is_file():
                path.unlink()
        for name, data in pending.items():
            (site / name).write_bytes(data)
            (site / name).chmod(0o600)

    kills = _until_it_lives(xfed.client.home, lambda: install_kit(site, kit, now=NOW), check)
    assert kills >= 4
    assert admitted == {read_kit(kit).public_key, json.loads(before["kit.json"])["public_key"]}


def test_a_kill_while_another_federations_kit_is_installed(tmp_path: Path, site: Path) -> None:
    other = _found(tmp_path, "other")
    kit = other.approve(read_request(ask_to_enrol(site, again=True, now=NOW).path, NOW), now=NOW)[1]
    first = (site / "kit.json").read_bytes()

    def check() -> None:
        home = load_home(site, now=NOW)
        assert home.ca_path.read_text() == home.ca_pem
        assert json.loads((site / "site.json").read_text())["federation"] == home.federation
        (site / "kit.json").write_bytes(first)

    assert _until_it_lives(xfed.client.home, lambda: install_kit(site, kit, again=True, now=NOW), check) >= 2


def test_a_kill_while_a_site_is_founded_or_asks_is_finished_by_the_same_command(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    keys: set[bytes] = set()

    def action() -> None:
        found_home(folder, "st-a")
        ask_to_enrol(folder, now=NOW)

    def check() -> None:
        if (folder / "key").exists():
            keys.add((folder / "key").read_bytes())

    assert _until_it_lives(xfed.client.home, action, check) >= 4
    assert len(keys) == 1  # a kill never costs the key
    assert read_request(folder / "request.json", NOW).site == "st-a"


def test_a_kill_while_a_site_is_approved_is_finished_by_the_same_command(
    tmp_path: Path, federation: Federation
) -> None:
    request = read_request(_ask(tmp_path / "site"), NOW)

    def action() -> None:
        if not federation.members():
            federation.approve(request, now=NOW)

    def check() -> None:
        members = federation.members()
        log = (federation.folder / "membership.jsonl").read_text()
        assert not members or ('"approve"' in log and (federation.folder / "kits/st-a.kit.json").exists())

    assert _until_it_lives(xfed.server.federation, action, check) >= 3
    assert install_kit(tmp_path / "site", federation.folder / "kits/st-a.kit.json", now=NOW).name == "st-a"


def test_a_kill_while_a_federation_is_founded_leaves_none(tmp_path: Path) -> None:
    def check() -> None:
        if (tmp_path / "federation").exists():
            load_federation(tmp_path / "federation").check_server(NOW)

    assert _until_it_lives(xfed.server.federation, lambda: _found(tmp_path), check) >= 5
    assert [path.name for path in tmp_path.iterdir()] == ["federation"]


def test_a_kill_while_the_certificate_is_renewed_is_said_and_mended(federation: Federation) -> None:
    told: list[str] = []

    def check() -> None:
        try:
            load_federation(federation.folder).check_server(NOW)
        except IdentityError as error:
            told.append(str(error))
            load_federation(federation.folder).renew(now=NOW)
        load_federation(federation.folder).check_server(NOW)

    assert _until_it_lives(xfed.server.federation, lambda: federation.renew(fresh=True, now=NOW), check) >= 3
    assert told
    assert all("xfed-server renew" in line for line in told)


# TLS


@contextlib.contextmanager
def _serving(federation: Federation) -> Iterator[int]:
    """A TLS server on loopback with the federation's certificate; gives its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(federation.server_cert, federation.server_key)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    raw, _ = listener.accept()
                except OSError:
                    return
                with raw, contextlib.suppress(OSError), context.wrap_socket(raw, server_side=True) as wrapped:
                    wrapped.sendall(b"hello")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def _hear(port: int, ca: Path, name: str) -> bytes:
    context = ssl.create_default_context(cafile=ca)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname=name) as wrapped,
    ):
        return wrapped.recv(5)


def test_the_certificate_is_served_and_pinned(tmp_path: Path) -> None:
    found = found_federation(
        tmp_path / "f", name="Chest North", address="localhost:9092", also=("127.0.0.1", "xray.example.org")
    )
    other = found_federation(tmp_path / "other", name="Chest North", address="localhost:9092")
    found.check_server()
    home_folder = tmp_path / "site"
    found_home(home_folder, "st-a")
    kit = found.approve(read_request(ask_to_enrol(home_folder).path))[1]
    ca = install_kit(home_folder, kit).ca_path
    with _serving(found) as port:
        for name in ("localhost", "127.0.0.1", "xray.example.org"):
            assert _hear(port, ca, name) == b"hello"
        for name in ("example.org", "127.0.0.2", "evil.xray.example.org"):
            with pytest.raises(ssl.SSLCertVerificationError, match=r"[Hh]ostname|IP address"):
                _hear(port, ca, name)
        with pytest.raises(ssl.SSLCertVerificationError, match="verify failed"):
            _hear(port, other.folder / "ca.pem", "localhost")
    found.renew(also=("coordinator.example.org",), fresh=True)
    with _serving(found) as port:
        assert _hear(port, ca, "coordinator.example.org") == b"hello"
        assert _hear(port, ca, "localhost") == b"hello"
    found.renew(now=datetime.now(UTC) - 398 * DAY)
    with _serving(found) as port, pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        _hear(port, ca, "localhost")
    with pytest.raises(IdentityError, match=r"expired on .* Run xfed-server renew"):
        found.check_server()


def test_a_renewal_keeps_the_key_unless_a_new_one_is_asked_for(federation: Federation) -> None:
    key, pem = federation.server_key.read_bytes(), federation.server_cert.read_text()
    end = federation.renew(now=NOW + 300 * DAY)
    assert end == NOW + 697 * DAY
    assert federation.server_key.read_bytes() == key
    assert federation.server_cert.read_text() != pem
    federation.renew(fresh=True, also=("b.org", "B.org", "localhost"), now=NOW)
    assert federation.server_key.read_bytes() != key
    again = load_federation(federation.folder)
    assert again.names == ("localhost", "127.0.0.1", "b.org")
    again.check_server(NOW)
    with pytest.raises(IdentityError, match="neither"):
        federation.renew(also=("*.org",), now=NOW)
    federation.server_key.unlink()
    new_key(federation.server_key, tls=True)
    with pytest.raises(IdentityError, match="no pair"):
        again.check_server(NOW)
    federation.server_key.unlink()
    federation.renew(now=NOW)
    again.check_server(NOW)


# Commands


class _Commands:
    """The commands as a person runs them, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._app = typer.Typer()
        for command in ("init", "approve", "revoke", "renew", "members"):
            self._app.command()(getattr(federation_cli, command))
        self._app.command()(enroll)

    def __call__(self, *arguments: str, fails: type[XfedError] | None = None, text: str | None = None) -> Result:
        with contextlib.chdir(self._folder):
            result = CliRunner().invoke(self._app, arguments, input=text)
        if fails is None:
            assert result.exception is None, (result.exception, result.output)
        else:
            assert isinstance(result.exception, fails), (result.exception, result.output)
        return result


def test_the_commands_from_founding_to_revocation(tmp_path: Path) -> None:
    run = _Commands(tmp_path)
    shown = json.loads(run("init", "--name", "Chest North", "--address", "localhost:9092", "--json").stdout)
    assert shown["names"] == ["localhost"]
    asked = json.loads(run("enroll", "--name", "st-a", "--json").stdout)
    assert asked["request"] == "site/request.json"
    told = asked["fingerprint"]
    refused = run("approve", "site/request.json", fails=ConfigError)
    assert told in refused.stderr
    assert "--yes" in str(refused.exception)
    run("approve", "site/request.json", "--yes", "--fingerprint", "SHA256:x", fails=IdentityError)
    assert json.loads(run("members", "--json").stdout)["members"] == []
    assert "no members yet" in run("members").stdout
    approved = json.loads(
        run("approve", "site/request.json", "--yes", "--fingerprint", told, "--days", "20", "--json").stdout
    )
    assert (approved["site"], approved["state"], approved["fingerprint"]) == ("st-a", "active", told)
    enrolled = json.loads(run("enroll", "--kit", approved["kit"], "--json").stdout)
    assert enrolled["ca_fingerprint"] == shown["ca_fingerprint"] == approved["ca_fingerprint"]
    assert len(enrolled["warnings"]) == 1
    listed = json.loads(run("members", "--json").stdout)
    assert [member["site"] for member in listed["members"]] == ["st-a"]
    assert "enroll --rotate" in listed["warnings"][0]
    assert re.search(r"st-a.*active", run("members").stdout)
    assert "b.org" in run("renew", "--also", "b.org").stdout
    assert json.loads(run("renew", "--new-key", "--json").stdout)["names"] == ["localhost", "b.org"]
    run("revoke", "st-z", "--reason", "x", fails=IdentityError)
    assert "laptop stolen" in run("revoke", "st-a", "--reason", "laptop stolen").stdout
    run("enroll", "--name", "st-a", fails=IdentityError)
    run("enroll", "--name", "st-a", "--again")
    run("approve", "site/request.json", "--yes", fails=IdentityError)
    again = run("approve", "site/request.json", "--yes", "--again")
    assert "the key that was revoked" in again.stderr
    assert "laptop stolen" in again.stderr


def test_approval_asks_a_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _Commands(tmp_path)
    run("init", "--name", "Chest North", "--address", "localhost:9092")
    run("enroll", "--name", "st-a")
    monkeypatch.setattr(federation_cli, "sys", _Terminal)
    run("approve", "site/request.json", text="n\n", fails=IdentityError)
    assert load_federation(tmp_path / "federation").members() == {}
    shown = run("approve", "site/request.json", text="y\n")
    assert "by telephone?" in shown.stderr
    assert list(load_federation(tmp_path / "federation").members()) == ["st-a"]


class _Terminal:
    class stdin:  # noqa: N801
        isatty = staticmethod(lambda: True)


@pytest.mark.parametrize(
    "arguments", [(), ("--name", "a", "--rotate"), ("--kit", "k", "--name", "a"), ("--rotate", "--again")]
)
def test_enroll_does_one_thing_at_a_time(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    _Commands(tmp_path)("enroll", *arguments, fails=ConfigError)
    assert not list(tmp_path.iterdir())


def test_what_is_signed_is_canonical(federation: Federation) -> None:
    signature = federation.sign("plan", {"b": 1, "a": "é"})
    key = parse_certificate(federation.ca_pem, "ca.pem").public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    verify_json("plan", json.loads(canonical_json({"a": "é", "b": 1})), signature, key)
