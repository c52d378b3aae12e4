"""Who is who: P-384 keys, their fingerprints, signatures over JSON, and certificates.

::

    new_key --> key (0600, OpenSSH) ---- sign_json(kind, values) --> base64 --+--> request, kit, plan
                key.pub (one line) --fingerprint--> SHA256:... by telephone   |
    ca.key --> ca.pem (10 years) --> server.pem (397 days, SAN)               +--> verify_json | IdentityError

A private key is written whole, once, and readable by its owner only from the first byte on; nothing here sends one.

Guarantees: a signature is ECDSA P-384 with SHA-384 over ``b"xfed <kind> v1\\n"`` + canonical JSON, so a signature of one kind
of file is none of another kind, and none of a certificate (whose signed bytes begin with 0x30). Not covered: signatures are
malleable as all ECDSA is; they prove who signed what and are never used as names.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import ipaddress
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from xfed.common.durable import write_bytes
from xfed.common.errors import IdentityError
from xfed.common.version import SOFTWARE

__all__ = [
    "SCHEMA",
    "PrivateKey",
    "PublicKey",
    "canonical_json",
    "certificate_fingerprint",
    "certificate_problem",
    "check_site_name",
    "fingerprint",
    "format_time",
    "load_private_key",
    "new_authority",
    "new_key",
    "new_server_certificate",
    "parse_address",
    "parse_authority",
    "parse_certificate",
    "parse_host",
    "parse_public_key",
    "parse_time",
    "public_text",
    "read_bounded",
    "sign_bytes",
    "sign_json",
    "software",
    "utc_now",
    "verify_bytes",
    "verify_json",
]

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey

SCHEMA = 1
AUTHORITY_DAYS, SERVER_DAYS = 3650, 397
_SKEW = timedelta(hours=1)
_SITE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_KIND = re.compile(r"[a-z][a-z-]{0,31}")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_SIGNATURE = ec.ECDSA(hashes.SHA384())


def utc_now() -> datetime:
    """This moment, in UTC, in whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)


def format_time(moment: datetime) -> str:
    """ISO 8601 in UTC, whole seconds: what travels and what is on disk."""
    return moment.astimezone(UTC).isoformat(timespec="seconds")


def parse_time(text: str, where: str) -> datetime:
    """A moment that `format_time` wrote. Raises `IdentityError`."""
    try:
        moment = datetime.fromisoformat(text)
        if moment.utcoffset() == timedelta(0) and format_time(moment) == text:
            return moment
    except ValueError:
        pass
    raise IdentityError(f"{where} is {text!r:.60}, not a time in UTC like 2030-01-31T12:00:00+00:00")


def software() -> str:
    """Name and version of this software."""
    return SOFTWARE


def check_site_name(name: str) -> str:
    """The name itself. Raises `IdentityError` unless it is 1-63 of a-z, 0-9 and hyphens: it becomes a file's name."""
    if not _SITE_NAME.fullmatch(name):
        raise IdentityError(
            f"{name!r:.80} is not a site's name: it must be 1 to 63 lower-case letters, digits and hyphens, "
            "and begin with a letter or digit, for instance st-elsewhere"
        )
    return name


def read_bounded(path: Path, limit: int) -> tuple[bytes, int]:
    """The bytes and the permission bits of a regular file. Raises `IdentityError`."""
    try:
        # without O_NONBLOCK a named pipe would be waited for
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise IdentityError(f"{path} is not a file")
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        raise IdentityError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > limit:
        raise IdentityError(f"{path} is too long: at most {limit:,} bytes are expected")
    return data, stat.S_IMODE(status.st_mode)


# Keys


def public_text(key: PublicKey) -> str:
    """The key as one line of OpenSSH, without a comment: ``ecdsa-sha2-nistp384 AAAA...``."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def parse_public_key(text: str, where: str = "the public key") -> PublicKey:
    """The key of a line that `public_text` wrote. Raises `IdentityError` naming `where`."""
    try:
        key = serialization.load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise IdentityError(f"{where} is not an OpenSSH public key: {text!r:.60}") from error
    if not isinstance(key, PublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise IdentityError(f"{where} is not a P-384 key (ecdsa-sha2-nistp384): {text!r:.60}")
    if public_text(key) != text:
        raise IdentityError(f"{where} must be two words on one line, without a comment: {text!r:.60}")
    return key


def fingerprint(text: str) -> str:
    """``SHA256:...`` of an OpenSSH public key, as ``ssh-keygen -lf`` prints it. Raises `IdentityError`."""
    parse_public_key(text)
    digest = hashlib.sha256(base64.b64decode(text.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def new_key(path: Path, *, tls: bool = False) -> PrivateKey:
    """Make a P-384 key and write it to `path`, mode 0600; a file that is there is never overwritten.

    OpenSSH format, or PKCS#8 with `tls` (TLS libraries read no other). Raises `IdentityError`, `StorageError`.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    form = serialization.PrivateFormat.PKCS8 if tls else serialization.PrivateFormat.OpenSSH
    data = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    whole = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_bytes(whole, data, private=True)
        os.link(whole, path)  # unlike a rename, this fails where a key is already
    except FileExistsError as error:
        raise IdentityError(
            f"{path} exists and is never overwritten: move it away if you mean to replace it"
        ) from error
    finally:
        whole.unlink(missing_ok=True)
    return key


def load_private_key(path: Path) -> PrivateKey:
    """Read a P-384 key, OpenSSH or PKCS#8. Raises `IdentityError` also when others than the owner may read the file."""
    data, mode = read_bounded(path, 16_384)
    if mode & 0o077:
        raise IdentityError(f"{path} can be read by others than its owner (mode {mode:04o}): run chmod 600 {path}")
    try:
        if data.startswith(b"-----BEGIN OPENSSH"):
            key: object = serialization.load_ssh_private_key(data, password=None)
        else:
            key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IdentityError(f"{path} is not a private key without a passphrase, or it is damaged") from error
    if not isinstance(key, PrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise IdentityError(f"{path} is not a P-384 key: make one with ssh-keygen -t ecdsa -b 384 -N '' -f {path}")
    return key


# Signatures


def canonical_json(values: Any) -> bytes:
    """The one way to write plain values: sorted keys, no spaces, UTF-8. Raises `IdentityError` (NaN, keys that are no text)."""
    _refuse_other_keys(values)
    try:
        text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8")
    except (ValueError, TypeError) as error:
        raise IdentityError(f"this cannot be written as JSON: {error}") from error


def _refuse_other_keys(values: Any) -> None:
    """JSON turns the key 2 into "2", which sorts differently when it is read back."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            if not isinstance(key, str):
                raise IdentityError(f"this cannot be written as JSON: the key {key!r:.60} is not text")
            _refuse_other_keys(value)
    elif isinstance(values, list | tuple):
        for value in values:
            _refuse_other_keys(value)


def _domain(kind: str) -> bytes:
    if not _KIND.fullmatch(kind):
        raise ValueError(f"{kind!r} is not a kind of signed content: lower-case letters and hyphens")
    return f"xfed {kind} v1\n".encode()


def sign_bytes(kind: str, data: bytes, key: PrivateKey) -> str:
    """Base64 signature of `data` as a `kind` (see the module's guarantees)."""
    return base64.b64encode(key.sign(_domain(kind) + data, _SIGNATURE)).decode()


def verify_bytes(kind: str, data: bytes, signature: str, key: PublicKey, where: str = "") -> None:
    """Return only if `key` signed `data` as a `kind`. Raises `IdentityError` naming `where`."""
    try:
        key.verify(base64.b64decode(signature.encode(), validate=True), _domain(kind) + data, _SIGNATURE)
    except (InvalidSignature, binascii.Error, UnicodeEncodeError) as error:
        raise IdentityError(
            f"{where or kind}: the signature does not fit: the content was changed on its way, or somebody else signed it. "
            "Use it for nothing, and ask its sender for it again."
        ) from error


def sign_json(kind: str, values: Mapping[str, Any], key: PrivateKey) -> str:
    """Base64 signature of the canonical JSON of `values` as a `kind`. Raises `IdentityError`."""
    return sign_bytes(kind, canonical_json(values), key)


def verify_json(kind: str, values: Mapping[str, Any], signature: str, key: PublicKey, where: str = "") -> None:
    """Return only if `key` signed `values` as a `kind`. Raises `IdentityError` naming `where`."""
    verify_bytes(kind, canonical_json(values), signature, key, where)


# Certificates


def parse_host(text: str) -> x509.GeneralName:
    """A host as a certificate names it: an IP address or a DNS name in ASCII. Raises `IdentityError`."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        labels = text.lower().split(".")
        if len(text) <= 253 and all(_LABEL.fullmatch(label) for label in labels) and not labels[-1].isdigit():
            return x509.DNSName(text.lower())
        raise IdentityError(
            f"{text!r:.80} is neither an IP address nor a host name in ASCII (no wildcards; write umlauts as xn--...)"
        ) from None
    if address.is_unspecified or address.is_multicast or "%" in text:
        raise IdentityError(f"{text} is no address that a site can connect to: give the one the sites will use")
    return x509.IPAddress(address)


def parse_address(text: str) -> tuple[str, int]:
    """``host:port`` or ``[IPv6]:port``. Raises `IdentityError`."""
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not host or (":" in host) != bracketed or not re.fullmatch(r"[1-9][0-9]{0,4}", port) or int(port) > 65535:
        raise IdentityError(f"{text!r:.80} is not HOST:PORT, for instance xray.example.org:9092 or [2001:db8::1]:9092")
    parse_host(host)
    return host, int(port)


def _certificate(
    name: x509.Name, key: PublicKey, issuer: x509.Name, issuer_key: PublicKey, start: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - _SKEW)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _common_name(text: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "xfed federation"),
            x509.NameAttribute(NameOID.COMMON_NAME, text),
        ]
    )


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def new_authority(federation: str, key: PrivateKey, now: datetime) -> str:
    """The federation's own certificate (PEM), valid for ten years from an hour before `now`."""
    name, public = _common_name(federation), key.public_key()
    builder = _certificate(name, public, name, public, now, now + timedelta(days=AUTHORITY_DAYS))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return _pem(builder.add_extension(_usage(authority=True), critical=True).sign(key, hashes.SHA384()))


def new_server_certificate(key: PublicKey, hosts: Sequence[str], ca_key: PrivateKey, ca: str, now: datetime) -> str:
    """A certificate (PEM) for these hosts, valid for 397 days or as long as the authority. Raises `IdentityError`."""
    authority = parse_certificate(ca, "the federation's certificate")
    if authority.public_key() != ca_key.public_key():
        raise IdentityError("ca.key and ca.pem are no pair: restore both from the same backup")
    end = min(now + timedelta(days=SERVER_DAYS), authority.not_valid_after_utc)
    if end <= now:
        raise IdentityError(f"the federation's certificate expired on {end:%Y-%m-%d}: found a new federation")
    builder = _certificate(_common_name("coordinator"), key, authority.subject, ca_key.public_key(), now, end)
    builder = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([parse_host(host) for host in hosts]), critical=False)
    )
    return _pem(builder.sign(ca_key, hashes.SHA384()))


def parse_certificate(pem: str, where: str) -> x509.Certificate:
    """The one certificate of a PEM text that holds nothing else. Raises `IdentityError` naming `where`."""
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
        if _pem(certificate) == pem:
            return certificate
    except ValueError:
        pass
    raise IdentityError(f"{where} is not one PEM certificate")


def parse_authority(pem: str, federation: str, where: str) -> PublicKey:
    """The key that may sign for `federation`. Raises `IdentityError` unless `pem` is such a certificate as `new_authority`'s."""
    certificate = parse_certificate(pem, where)
    try:
        certificate.verify_directly_issued_by(certificate)
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        sound = constraints.ca and usage.key_cert_sign and certificate.subject == _common_name(federation)
        key = certificate.public_key()
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.ExtensionNotFound) as error:
        raise IdentityError(f"{where} is not the certificate of a federation: it is not signed by itself") from error
    if not sound or not isinstance(key, PublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise IdentityError(f"{where} is not the certificate of the federation {federation!r:.80}")
    return key


def certificate_problem(pem: str, where: str, now: datetime) -> str | None:
    """Why a certificate cannot be used at `now`, or None. Raises `IdentityError` when it is none."""
    certificate = parse_certificate(pem, where)
    if now < certificate.not_valid_before_utc:
        return f"{where} is valid only from {format_time(certificate.not_valid_before_utc)}: is this machine's clock right?"
    if now >= certificate.not_valid_after_utc:
        return f"{where} expired on {format_time(certificate.not_valid_after_utc)}"
    return None


def certificate_fingerprint(pem: str) -> str:
    """SHA-256 of a certificate as ``AB:CD:...`` (``openssl x509 -fingerprint -sha256``). Raises `IdentityError`."""
    return parse_certificate(pem, "the certificate").fingerprint(hashes.SHA256()).hex(":").upper()
