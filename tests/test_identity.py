"""Keys, fingerprints, signatures and certificates: against ssh-keygen and openssl, and every refusal."""

from __future__ import annotations

import base64
import json
import os
import shutil
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from xfed.common.errors import IdentityError
from xfed.common.identity import (
    canonical_json,
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
    public_text,
    read_bounded,
    sign_bytes,
    sign_json,
    verify_bytes,
    verify_json,
)

NOW = datetime(2030, 1, 31, 12, tzinfo=UTC)
KEY, OTHER = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def _tool(*command: str | Path, data: bytes | None = None) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not on this machine")
    done = subprocess.run([str(part) for part in command], input=data, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


# Keys


def test_a_key_is_private_whole_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key"
    before = os.umask(0)
    try:
        key = new_key(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert public_text(load_private_key(path).public_key()) == public_text(key.public_key())
    assert path.read_text().startswith("-----BEGIN OPENSSH PRIVATE KEY-----")
    data = path.read_bytes()
    with pytest.raises(IdentityError, match="never overwritten"):
        new_key(path)
    assert path.read_bytes() == data
    assert [each.name for each in tmp_path.iterdir()] == ["key"]  # no second copy of a secret


def test_a_tls_key_is_one_that_openssl_reads(tmp_path: Path) -> None:
    key = new_key(tmp_path / "server.key", tls=True)
    assert load_private_key(tmp_path / "server.key").private_numbers() == key.private_numbers()
    shown = _tool("openssl", "pkey", "-in", tmp_path / "server.key", "-pubout")
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    assert shown.encode() == key.public_key().public_bytes(serialization.Encoding.PEM, form)


def test_fingerprint_and_public_line_are_those_of_ssh_keygen(tmp_path: Path) -> None:
    text = public_text(new_key(tmp_path / "key").public_key())
    (tmp_path / "only.pub").write_text(text + "\n")
    shown = _tool("ssh-keygen", "-lf", tmp_path / "only.pub").split()
    assert shown[:2] == ["384", fingerprint(text)]
    assert _tool("ssh-keygen", "-y", "-f", tmp_path / "key").split()[:2] == text.split()


def test_a_key_that_ssh_keygen_made_is_taken(tmp_path: Path) -> None:
    _tool("ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", "a comment", "-f", tmp_path / "key")
    written = (tmp_path / "key.pub").read_text().split()
    assert public_text(load_private_key(tmp_path / "key").public_key()).split() == written[:2]
    with pytest.raises(IdentityError, match="without a comment"):
        parse_public_key((tmp_path / "key.pub").read_text().strip())


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o660, 0o777])
def test_a_key_that_others_can_reach_is_refused_with_the_command(tmp_path: Path, mode: int) -> None:
    new_key(tmp_path / "key")
    (tmp_path / "key").chmod(mode)
    with pytest.raises(IdentityError, match=f"chmod 600 {tmp_path / 'key'}"):
        load_private_key(tmp_path / "key")
    (tmp_path / "key").chmod(0o400)
    load_private_key(tmp_path / "key")


def _write_key(path: Path, key: Any, password: bytes | None = None) -> None:
    kind = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, kind))
    path.chmod(0o600)


def test_other_keys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    for key in (ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 2048)):
        _write_key(path, key)
        with pytest.raises(IdentityError, match="P-384"):
            load_private_key(path)
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        with pytest.raises(IdentityError, match="P-384"):
            parse_public_key(public.decode())
    _write_key(path, KEY, b"secret")
    with pytest.raises(IdentityError, match="passphrase"):
        load_private_key(path)
    path.write_bytes(b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n")
    with pytest.raises(IdentityError, match="damaged"):
        load_private_key(path)
    for missing in (tmp_path / "none", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(IdentityError):
            load_private_key(missing)


@pytest.mark.parametrize("text", ["", "ssh-rsa", "ecdsa-sha2-nistp384 AAAA", "é", "x" * 100_000])
def test_what_is_no_public_key_is_refused(text: str) -> None:
    for function in (parse_public_key, fingerprint):
        with pytest.raises(IdentityError):
            function(text)
    line = public_text(KEY.public_key())
    for other in (line + "\n", line + " me", line.replace(" ", "  "), " " + line, line + "\n" + line):
        with pytest.raises(IdentityError):
            parse_public_key(other)
    parse_public_key(line)


def test_reading_is_bounded_and_never_waits(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bounded(tmp_path / "file", 5)[0] == b"12345"
    os.mkfifo(tmp_path / "pipe")
    for path, limit, words in (("file", 4, "too long"), ("pipe", 5, "not a file"), ("none", 5, "cannot be read")):
        with pytest.raises(IdentityError, match=words):
            read_bounded(tmp_path / path, limit)


# Names and times


@given(st.text(max_size=70) | st.from_regex(r"[a-z0-9-]{1,66}", fullmatch=True))
def test_a_site_name_is_safe_as_a_file_name(name: str) -> None:
    allowed = set("abcdefghijklmnopqrstuvwxyz0123456789-")
    good = 1 <= len(name) <= 63 and set(name) <= allowed and not name.startswith("-")
    if good:
        assert check_site_name(name) == name
    else:
        with pytest.raises(IdentityError, match="not a site's name"):
            check_site_name(name)


@pytest.mark.parametrize("name", ["../x", "a/b", ".", "..", "a\n", "A", "", "a" * 64, "a b", "a.b", "ä", "-a", "a\0"])
def test_names_that_would_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(IdentityError):
        check_site_name(name)


@given(st.datetimes(timezones=st.just(UTC)))
def test_times_come_back(moment: datetime) -> None:
    moment = moment.replace(microsecond=0)
    assert parse_time(format_time(moment), "t") == moment
    other = moment.isoformat().replace("+00:00", "")
    for text in (other, other + "Z", other + "+01:00", "", "2030-13-01T00:00:00+00:00"):
        with pytest.raises(IdentityError, match="not a time in UTC"):
            parse_time(text, "t")


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("xray.example.org:9092", ("xray.example.org", 9092)),
        ("127.0.0.1:1", ("127.0.0.1", 1)),
        ("[2001:db8::1]:65535", ("2001:db8::1", 65535)),
        ("localhost:443", ("localhost", 443)),
    ],
)
def test_addresses(text: str, parsed: tuple[str, int]) -> None:
    assert parse_address(text) == parsed


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "host",
            "host:",
            ":1",
            "host:0",
            "host:65536",
            "host:99999999",
            "host:1x",
            "host:-1",
            "host:01",
            "host:1\n",
        ),
        *(
            "2001:db8::1:9092",
            "[host]:1",
            "[::]:1",
            "[fe80::1%eth0]:1",
            "0.0.0.0:1",
            "224.0.0.1:1",
            "1.2.3:1",
            "host:١",
        ),
        *("https://host:1", "a b:1", "*.org:1", "münchen.de:1", "a..b:1", "-a.org:1", f"{'a' * 64}.org:1"),
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(IdentityError):
        parse_address(text)


# Signatures


@given(JSON)
def test_canonical_json_is_one_spelling(values: Any) -> None:
    data = canonical_json(values)
    assert canonical_json(json.loads(data)) == data
    assert json.loads(data) == values


def test_canonical_json_is_what_the_format_says() -> None:
    assert canonical_json({"b": [1, 2.5, None], "a": "é"}) == '{"a":"é","b":[1,2.5,null]}'.encode()


@pytest.mark.parametrize(
    "values", [{"a": float("nan")}, [float("inf")], {1: 2}, [{"a": {2: 1}}], {"a": {1, 2}}, "\ud800"]
)
def test_what_json_cannot_hold_is_not_signed(values: Any) -> None:
    with pytest.raises(IdentityError, match="JSON"):
        canonical_json(values)


def test_a_signature_is_what_openssl_verifies(tmp_path: Path) -> None:
    values = {"site": "st-a", "n": 1}
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "pem").write_bytes(KEY.public_key().public_bytes(serialization.Encoding.PEM, form))
    (tmp_path / "sig").write_bytes(base64.b64decode(sign_json("kit", values, KEY)))
    data = b'xfed kit v1\n{"n":1,"site":"st-a"}'
    shown = _tool("openssl", "dgst", "-sha384", "-verify", tmp_path / "pem", "-signature", tmp_path / "sig", data=data)
    assert "Verified OK" in shown


@given(values=st.dictionaries(st.text(max_size=4), JSON, max_size=4), other=JSON)
@settings(max_examples=40)
def test_a_signature_holds_for_its_values_kind_and_key_only(values: dict[str, Any], other: Any) -> None:
    signature = sign_json("request", values, KEY)
    verify_json("request", values, signature, KEY.public_key())
    changed = {**values, "added": other}
    for kind, content, key in (("kit", values, KEY), ("request", changed, KEY), ("request", values, OTHER)):
        with pytest.raises(IdentityError, match="signature does not fit"):
            verify_json(kind, content, signature, key.public_key())


@given(st.binary(max_size=40), st.integers(0, 10_000), st.integers(1, 255))
@settings(max_examples=60)
def test_no_changed_byte_of_a_signature_is_taken(data: bytes, place: int, change: int) -> None:
    raw = bytearray(base64.b64decode(sign_bytes("plan", data, KEY)))
    verify_bytes("plan", data, base64.b64encode(raw).decode(), KEY.public_key())
    raw[place % len(raw)] ^= change
    with pytest.raises(IdentityError):
        verify_bytes("plan", data, base64.b64encode(raw).decode(), KEY.public_key())


@pytest.mark.parametrize("signature", ["", "AAAA", "not base64!", "é", "A" * 100_000])
def test_what_is_no_signature_is_refused_by_name(signature: str) -> None:
    with pytest.raises(IdentityError, match=r"kit\.json: the signature does not fit"):
        verify_bytes("kit", b"data", signature, KEY.public_key(), "kit.json")


def test_kinds_cannot_run_into_the_content() -> None:
    for kind in ("", "a b", "kit v1\n", "Kit", "a" * 40):
        with pytest.raises(ValueError, match="not a kind"):
            sign_bytes(kind, b"", KEY)


# Certificates


def test_openssl_takes_the_certificates_and_shows_the_same_fingerprint(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    (tmp_path / "ca.pem").write_text(ca := new_authority("Chest North", KEY, now))
    server = new_server_certificate(OTHER.public_key(), ["localhost", "127.0.0.1", "::1"], KEY, ca, now)
    (tmp_path / "server.pem").write_text(server)
    for host in (["-verify_hostname", "localhost"], ["-verify_ip", "127.0.0.1"], ["-verify_ip", "::1"]):
        strict = ["-x509_strict", "-purpose", "sslserver", "-CAfile", tmp_path / "ca.pem"]
        assert "OK" in _tool("openssl", "verify", *strict, *host, tmp_path / "server.pem")
    shown = _tool("openssl", "x509", "-in", tmp_path / "ca.pem", "-noout", "-fingerprint", "-sha256")
    assert shown.strip().split("=")[1] == certificate_fingerprint(ca)


def test_certificates_say_what_they_are_for_and_how_long() -> None:
    pem = new_authority("Chest North", KEY, NOW)
    ca = parse_certificate(pem, "ca.pem")
    server = parse_certificate(new_server_certificate(OTHER.public_key(), ["a.org"], KEY, pem, NOW), "server.pem")
    for certificate, days in ((ca, 3650), (server, 397)):
        assert certificate.not_valid_before_utc == NOW - timedelta(hours=1)
        assert certificate.not_valid_after_utc == NOW + timedelta(days=days)
    usage = {each: each.extensions.get_extension_for_class(x509.KeyUsage).value for each in (ca, server)}
    basic = {each: each.extensions.get_extension_for_class(x509.BasicConstraints).value for each in (ca, server)}
    assert basic[ca].ca
    assert basic[ca].path_length == 0
    assert usage[ca].key_cert_sign
    assert not basic[server].ca
    assert not usage[server].key_cert_sign
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [parse_host("a.org")]
    # never longer than the authority, and not at all after it
    late = ca.not_valid_after_utc - timedelta(days=10)
    short = parse_certificate(new_server_certificate(OTHER.public_key(), ["a.org"], KEY, pem, late), "server.pem")
    assert short.not_valid_after_utc == ca.not_valid_after_utc
    with pytest.raises(IdentityError, match="expired"):
        new_server_certificate(OTHER.public_key(), ["a.org"], KEY, pem, ca.not_valid_after_utc)
    with pytest.raises(IdentityError, match="no pair"):
        new_server_certificate(OTHER.public_key(), ["a.org"], OTHER, pem, NOW)


def test_a_certificate_is_good_from_an_hour_before_until_its_end() -> None:
    pem = new_authority("Chest North", KEY, NOW)
    end, second = NOW + timedelta(days=3650), timedelta(seconds=1)
    for moment, word in (
        (NOW - timedelta(hours=1), None),
        (NOW - timedelta(hours=1) - second, "clock"),
        (end - second, None),
        (end, "expired"),
    ):
        problem = certificate_problem(pem, "ca.pem", moment)
        assert problem is None if word is None else problem is not None and word in problem


def test_only_a_federations_own_certificate_is_an_authority() -> None:
    pem = new_authority("Chest North", KEY, NOW)
    assert parse_authority(pem, "Chest North", "ca.pem") == KEY.public_key()
    server = new_server_certificate(OTHER.public_key(), ["a.org"], KEY, pem, NOW)
    name = parse_certificate(pem, "ca.pem").subject
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(OTHER.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=1))
    )
    plain = builder.sign(OTHER, hashes.SHA384())  # no extension says that it may sign
    forged = builder.sign(KEY, hashes.SHA384())  # names itself as its issuer, but another key signed it
    usage = parse_certificate(server, "server.pem").extensions.get_extension_for_class(x509.KeyUsage).value
    no_ca = x509.BasicConstraints(ca=False, path_length=None)
    humble = (
        builder.add_extension(no_ca, critical=True).add_extension(usage, critical=True).sign(OTHER, hashes.SHA384())
    )
    as_pem = [each.public_bytes(serialization.Encoding.PEM).decode() for each in (plain, forged, humble)]
    for other in (server, *as_pem, pem + pem, "x" + pem, pem.replace("\n", "\r\n"), "", "é", pem[:200]):
        with pytest.raises(IdentityError):
            parse_authority(other, "Chest North", "ca.pem")
    with pytest.raises(IdentityError, match="Chest South"):
        parse_authority(pem, "Chest South", "ca.pem")
