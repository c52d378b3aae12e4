"""The way to the coordinator, step by step: proxy, name, connection, certificate, answer, clock, and whether it admits this site.

::

    dial: one unsigned POST --> Dialled: how far it came, and what was met there    (xfed.client.dialling)
    Dialled --network_findings--> proxy -> dns -> tcp -> tls -> coordinator -> clock     (after a failure: not checked)
    identity: xfed-client start runs? what it says : come online with this site's key, and go

The coordinator answers an unsigned request with 401 and its own time: that proves who answers and tells the clock, and
changes nothing. Only when the certificate is wrong is a second connection made, without checking it, to say whose it is; nothing
is sent over it but a GET. On disk: `node`, as `xfed.client.link` writes it.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from xfed.client.dialling import DIAL_S, Dialled
from xfed.client.finding import Finding, TooSlowError, failed, ok, unchecked, warning
from xfed.client.home import SiteHome
from xfed.common.durable import exclusive
from xfed.common.errors import FederationError, IdentityError, StorageError
from xfed.common.journal import Journal

__all__ = ["check_identity", "network_findings"]

AHEAD_S, BEHIND_S = 5.0, 300.0
SOON = timedelta(days=30)
_EXPIRED, _NOT_YET, _WRONG_NAMES = 10, 9, (62, 64)  # OpenSSL's X509_V_ERR_...


def network_findings(way: Dialled, federation: str, foreign: Callable[[], Dialled]) -> Iterator[Finding]:
    """One finding per step of the way, in its order. `foreign` dials once more without checking the certificate."""
    steps: tuple[tuple[str, Callable[[], Finding]], ...] = (
        ("proxy", lambda: _proxy(way)),
        ("dns", lambda: _name(way)),
        ("tcp", lambda: _connection(way)),
        ("tls", lambda: _certificate(way, federation, foreign)),
        ("coordinator", lambda: _answer(way)),
        ("clock", lambda: _clock(way)),
    )
    broken = ""
    for name, step in steps:
        finding = unchecked(name, broken) if broken else step()
        if finding.status == "failed":
            broken = name
        yield finding


def _proxy(way: Dialled) -> Finding:
    if way.hop is None and way.error is not None:
        return failed(
            "proxy",
            FederationError,
            f"the environment's proxy setting cannot be used ({_said(way.error)})",
            "correct HTTPS_PROXY (or ALL_PROXY): write http://HOST:PORT, or http://USER:PASSWORD@HOST:PORT",
        )
    if way.proxied:
        return ok("proxy", f"connections go through {way.first} (HTTPS_PROXY)")
    return ok(
        "proxy", f"none: {way.target} is connected to directly (HTTPS_PROXY is not set, or NO_PROXY names the host)"
    )


def _name(way: Dialled) -> Finding:
    host, _ = way.hop or (way.host, way.port)
    whose = "the proxy's" if way.proxied else "the coordinator's"
    if way.peer is not None:
        through = "; the proxy looks up the coordinator's" if way.proxied else ""
        return ok("dns", f"{host} is {way.peer}{through}")
    remedy = f"compare with `getent hosts {host}`; ask those who run the network for a name server that knows {host}"
    if not way.proxied:
        remedy += ", or for the proxy to set as HTTPS_PROXY; ask the coordinator whether the address is still right"
    if (cause := _cause(way.error, socket.gaierror)) is not None:
        return failed("dns", FederationError, f"{whose} name {host} cannot be looked up ({_said(cause)})", remedy)
    if isinstance(way.error, TooSlowError):
        return failed("dns", FederationError, f"looking up {host} and connecting to it took over {DIAL_S:g} s", remedy)
    return ok("dns", f"{host} is known")


def _connection(way: Dialled) -> Finding:
    if way.peer is None:
        return failed("tcp", FederationError, *_not_connected(way))
    if way.distrusted:
        return failed(
            "tcp",
            FederationError,
            f"{way.first} does not speak TLS itself, or with a certificate that is not trusted here ({_said(way.error)})",
            "correct HTTPS_PROXY: most proxies want http://HOST:PORT there, and carry TLS to the coordinator all the same",
        )
    if isinstance(way.error, httpx.ProxyError):
        return failed("tcp", FederationError, *_not_let_through(way))
    tls_trouble = _cause(way.error, ssl.SSLError) is not None
    if way.proxied and not way.secure and way.error is not None and not tls_trouble:
        return failed(
            "tcp",
            FederationError,
            f"{way.first} took the connection, but did not open one to {way.target} ({_said(way.error)})",
            "is it an HTTP proxy that allows CONNECT? Compare HTTPS_PROXY with what those who run the network say",
        )
    return ok("tcp", f"connected to {way.target}{' through the proxy' if way.proxied else ''}")


def _not_connected(way: Dialled) -> tuple[str, str]:
    refused = _cause(way.error, ConnectionRefusedError) is not None
    if way.proxied:
        return (
            f"the proxy {way.first} {'refuses connections' if refused else f'does not answer ({_said(way.error)})'}",
            "correct HTTPS_PROXY, or add the coordinator's host to NO_PROXY if a direct connection is allowed",
        )
    if refused:
        return (
            f"coordinator not reachable: {way.target} refuses connections",
            "ask the coordinator whether it is running (xfed-server start) and listens on this port",
        )
    return (
        f"coordinator not reachable: {way.target} does not answer ({_said(way.error)})",
        f"ask the coordinator whether it is running; ask those who run the network to let outbound TCP to {way.target} through, "
        "or for the proxy to set as HTTPS_PROXY",
    )


def _not_let_through(way: Dialled) -> tuple[str, str]:
    said = _said(way.error)
    if said.startswith("407"):
        return f"{way.first} wants a user name ({said})", "set HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT"
    if said.startswith(("502", "503", "504")):
        return (
            f"coordinator not reachable: {way.first} cannot connect to {way.target} ({said})",
            "ask the coordinator whether it is running (xfed-server start), and whether the address is still right",
        )
    return (
        f"{way.first} does not let this machine through to {way.target} ({said})",
        f"ask those who run the proxy to allow CONNECT to {way.target}",
    )


def _certificate(way: Dialled, federation: str, foreign: Callable[[], Dialled]) -> Finding:
    if way.secure:
        return _good_certificate(way, federation)
    verification = _cause(way.error, ssl.SSLCertVerificationError)
    if isinstance(verification, ssl.SSLCertVerificationError):
        return _bad_certificate(way, federation, verification, foreign())
    if _cause(way.error, ssl.SSLError) is not None:
        what = f"what answers at {way.target} does not speak TLS as a coordinator does ({_said(way.error)})"
    else:
        what = f"the connection to {way.target} broke before the server showed a certificate ({_said(way.error)})"
    return failed(
        "tls",
        FederationError,
        what,
        "ask the coordinator whether this is its address and port; ask those who run the network whether TLS to it is blocked",
    )


def _good_certificate(way: Dialled, federation: str) -> Finding:
    if way.shown is None:
        return ok("tls", f"the certificate is {federation}'s and names {way.host}")
    end = way.shown.not_valid_after_utc
    if end - datetime.now(UTC) < SOON:
        remedy = "tell the coordinator: xfed-server renew, and a restart; sites need nothing new"
        return warning("tls", f"the coordinator's certificate ends on {end:%Y-%m-%d}", remedy)
    return ok("tls", f"the certificate is {federation}'s and names {way.host}; it ends on {end:%Y-%m-%d}")


def _bad_certificate(way: Dialled, federation: str, error: ssl.SSLCertVerificationError, seen: Dialled) -> Finding:
    shown = seen.shown
    if error.verify_code in _WRONG_NAMES:
        names = "" if shown is None else f", it names {', '.join(_names(shown)) or 'no host'}"
        return failed(
            "tls",
            IdentityError,
            f"the certificate is {federation}'s, but not for {way.host}{names}",
            f"ask the coordinator to run xfed-server renew --also {way.host} and to restart, or for a kit with the right address",
        )
    if error.verify_code in (_EXPIRED, _NOT_YET):
        span = ""
        if shown is not None:
            span = f": good from {_minute(shown.not_valid_before_utc)} to {_minute(shown.not_valid_after_utc)}"
        word = "has expired" if error.verify_code == _EXPIRED else "is not valid yet"
        return failed(
            "tls",
            IdentityError,
            f"the coordinator's certificate {word}{span}; this machine's clock says {_minute(datetime.now(UTC))}",
            "if this machine's clock is wrong, set it with NTP; else ask the coordinator to run xfed-server renew and to restart",
        )
    who = f" ({error.verify_message})"
    if shown is not None:
        fingerprint = shown.fingerprint(hashes.SHA256()).hex(":").upper()
        who = f": its certificate was issued by {_issuer(shown)!r:.120} and has the fingerprint {fingerprint}"
    return failed(
        "tls",
        IdentityError,
        f"somebody else answers at {way.target}, not {federation}'s coordinator{who}",
        f"is that a proxy which opens TLS (an inspection appliance)? Then ask those who run it to exempt {way.target}. If not, "
        "telephone the coordinator: only if it made a new federation certificate, install its new kit "
        "(xfed-client enroll --kit FILE --again)",
    )


def _answer(way: Dialled) -> Finding:
    if way.status == 401 and way.server_time is not None:
        return ok("coordinator", f"a coordinator of xfed answers at {way.target}")
    if way.status is None:
        what = f"the coordinator took the connection and gave no answer ({_said(way.error)})"
    else:
        what = f"{way.target} answers {way.status}, not as a coordinator of this version of xfed does"
    return failed("coordinator", FederationError, what, "ask the coordinator whether it is running, and which version")


def _clock(way: Dialled) -> Finding:
    server = way.server_time
    if server is None or way.sent is None or way.received is None:
        return unchecked("clock", "coordinator")
    doubt = (way.received - way.sent).total_seconds() / 2
    skew = (way.sent - server).total_seconds() + doubt
    words = f"this machine's clock is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} the coordinator's"
    remedy = (
        "set this machine's clock with NTP (timedatectl set-ntp true, or chronyd); if it is right, tell the coordinator"
    )
    if skew - doubt > AHEAD_S or skew + doubt < -BEHIND_S:
        return failed("clock", FederationError, f"{words}; requests are refused beyond 5 s ahead, 300 s behind", remedy)
    if skew - doubt > AHEAD_S / 2 or skew + doubt < -BEHIND_S / 2:
        return warning("clock", words, remedy)
    return ok("clock", words)


def check_identity(home: SiteHome, address: str) -> Finding:
    """Whether the coordinator admits this site's key. A running agent is not disturbed: what it last said is reported."""
    from xfed.client.link import FleetLink  # brings Flower along

    try:
        with exclusive(home.folder / "agent"):
            link = FleetLink(address, home.ca_pem, home.private_key, home.folder / "node")
            try:
                link.connect()
            finally:
                link.close()
    except StorageError as error:
        if not isinstance(error.__cause__, BlockingIOError):
            raise
        return _running(home)
    except IdentityError as error:
        remedy = "ask the coordinator for this site's state (xfed-server members); after a revocation: xfed-client enroll --again"
        return failed("identity", IdentityError, str(error), remedy)
    except FederationError as error:
        return failed("identity", FederationError, str(error), "run this again in a minute; then ask the coordinator")
    return ok("identity", f"the coordinator admits {home.name}")


def _running(home: SiteHome) -> Finding:
    kinds = ("started", "connected", "disconnected")
    said = [event for event in Journal(home.folder / "agent.jsonl").read() if event.get("kind") in kinds]
    if said and said[-1]["kind"] == "connected":
        return ok("identity", f"xfed-client start is running and connected since {said[-1].get('time')}")
    last = said[-1] if said else {}
    text = f"xfed-client start is running, but not connected: {last.get('text', 'it has only just started')}"
    return warning("identity", text, "wait a minute; if that does not help, stop it and run xfed-client check again")


def _cause(error: BaseException | None, kind: type[BaseException]) -> BaseException | None:
    """The first of the errors that led to `error` (itself included) that is a `kind`."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error


def _said(error: BaseException | None) -> str:
    return f"{str(error) or type(error).__name__:.200}"


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return [str(name.value) for name in names]


def _issuer(certificate: x509.Certificate) -> str:
    common = certificate.issuer.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(common[0].value) if common else certificate.issuer.rfc4514_string()


def _minute(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%MZ}"
