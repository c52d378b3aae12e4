"""A local page answers who has its token, under its own name, for what is its own; everything else is refused in words."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from fastapi import FastAPI, HTTPException, Request

from xfed.common.errors import DataError, StorageError
from xfed.common.page_guard import BODY_LIMIT, HEADERS
from xfed.common.pages import add_page, page_app, running_page, safe_file, serve_page

CSP = (
    "default-src 'none'; img-src 'self'; script-src 'self'; style-src 'self'; connect-src 'self'; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'self'"
)


class Page:
    """A page whose one route counts how often it ran; requests go out byte by byte as they are written here."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ran, self.url = folder, 0, ""

    def app(self, token: str, port: int) -> FastAPI:
        made = page_app(title="a <b>", token=token, port=port)
        (self.folder / "page.html").write_text('<meta name="t" content="{{ token }}"><title>{{title}}</title>')
        (self.folder / "page.js").write_text("1")
        add_page(made, token=token, page=self.folder / "page.html", assets={"page.js": self.folder / "page.js"})

        @made.api_route("/count", methods=["GET", "POST", "PUT", "DELETE"])
        async def count(request: Request) -> int:
            self.ran += 1
            return len(await request.body())

        @made.get("/files/{name:path}")
        async def file(name: str) -> str:
            self.ran += 1
            return safe_file(self.folder / "root", name).read_text()

        @made.get("/broken")
        def broken() -> None:
            raise DataError("the store is gone: import again")

        return made

    @property
    def token(self) -> str:
        return parse_qs(urlsplit(self.url).query)["token"][0]

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 0

    def ask(
        self, path: str = "/count", method: str = "GET", body: bytes | None = None, **headers: str | None
    ) -> tuple[int, str, dict[str, str]]:
        """A request as the page's own script sends it, but for `headers` (None: without it)."""
        sent: dict[str, str | None] = {
            "Host": f"127.0.0.1:{self.port}",
            "Cookie": f"xfed-{self.port}={self.token}",
            "X-Xfed-Token": self.token if method != "GET" else None,
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in sent.items():
                if value is not None:
                    connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            reply = connection.getresponse()
            return reply.status, reply.read().decode(), {name.lower(): value for name, value in reply.getheaders()}
        finally:
            connection.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    made = Page(tmp_path_factory.mktemp("page"))
    with running_page(made.app) as url:
        made.url = url
        yield made


def _refused(page: Page, status: int, words: str, *args: str, **kwargs: str | None) -> None:
    before = page.ran
    found, text, headers = page.ask(*args, **kwargs)
    assert (found, page.ran) == (status, before), text
    assert words in text
    assert headers["content-type"].startswith("text/plain")
    assert headers["content-security-policy"] == CSP


# --- the token


def test_the_address_is_loopback_and_its_token_is_long_and_new(page: Page) -> None:
    parts = urlsplit(page.url)
    assert parts.hostname == "127.0.0.1"
    assert len(page.token) >= 43
    with running_page(page.app) as other:
        assert page.token not in other


def test_the_token_becomes_a_cookie_and_leaves_the_address(page: Page) -> None:
    status, _, headers = page.ask(f"/?token={page.token}", Cookie=None)
    assert (status, headers["location"]) == (303, "/")
    cookie = headers["set-cookie"]
    assert cookie.startswith(f"xfed-{page.port}={page.token};")
    assert {"HttpOnly", "SameSite=Strict"} <= {part.strip() for part in cookie.split(";")}
    with httpx.Client(follow_redirects=True, trust_env=False) as client:
        reply = client.get(page.url)
        assert reply.status_code == 200
        assert "token=" not in str(reply.url)
        assert f'content="{page.token}"><title>a &lt;b&gt;</title>' in reply.text
        assert client.get(str(reply.url) + "assets/page.js").text == "1"


def test_the_redirect_stays_on_the_page(page: Page) -> None:
    status, _, headers = page.ask(f"//evil.example/?token={page.token}", Cookie=None)
    assert (status, headers["location"]) == (303, "/evil.example/")


@pytest.mark.parametrize(
    "path", ["/", "/count", "/assets/page.js", "/files/a.txt", "/nothing", "/openapi.json", "/docs"]
)
def test_nothing_without_the_token(page: Page, path: str) -> None:
    _refused(page, 403, "needs its token", path, Cookie=None)


@pytest.mark.parametrize(
    "cookie",
    ["", "wrong", "{token}x", "{start}", "\xff", '"{token}"', "{token}; xfed-{port}=wrong", "wrong; other={token}"],
)
def test_nothing_with_a_wrong_token(page: Page, cookie: str) -> None:
    said = cookie.format(token=page.token, start=page.token[:-1], port=page.port)
    _refused(page, 403, "needs its token", Cookie=f"xfed-{page.port}={said}")


def test_a_wrong_token_in_the_address_is_refused_even_with_the_cookie(page: Page) -> None:
    for query in ("token=wrong", "token=", f"token={page.token}&token={page.token}", f"token={page.token}%00"):
        _refused(page, 403, "needs its token", f"/count?{query}")


def test_the_cookie_of_another_page_of_this_machine_is_no_token(page: Page) -> None:
    _refused(page, 403, "needs its token", Cookie=f"xfed-{page.port + 1}={page.token}")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
@pytest.mark.parametrize("header", [None, "", "wrong"])
def test_what_changes_something_needs_the_header_too(page: Page, method: str, header: str | None) -> None:
    _refused(page, 403, "X-Xfed-Token", "/count", method, X_Xfed_Token=header)


def test_the_token_in_the_address_opens_nothing_that_changes(page: Page) -> None:
    _refused(page, 403, "needs its token", f"/count?token={page.token}", "POST", Cookie=None)
    assert page.ask("/count", "POST", b"12345")[:2] == (200, "5")


# --- who asks


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "127.0.0.1",
        "localhost",
        "127.0.0.1:1",
        "127.0.0.1:{port}.evil.example",
        "",
        None,
        "[::1]:{port}",
        "0.0.0.0:{port}",
        "127.0.0.1:{port}@evil.example",
    ],
)
def test_another_name_for_this_machine_is_refused(page: Page, host: str | None) -> None:
    if host is None:  # HTTP/1.1 itself forbids it
        assert page.ask(Host=None)[0] in (400, 403)
    else:
        _refused(page, 403, "127.0.0.1 alone", Host=host.format(port=page.port))


def test_two_names_at_once_are_refused(page: Page) -> None:
    with socket.create_connection(("127.0.0.1", page.port), timeout=10) as line:
        host = f"Host: 127.0.0.1:{page.port}\r\n"
        line.sendall(f"GET /count HTTP/1.1\r\n{host}Host: evil.example\r\nConnection: close\r\n\r\n".encode())
        assert line.recv(100).split()[1] in (b"400", b"403")


def test_localhost_is_this_machine_too(page: Page) -> None:
    assert page.ask(Host=f"localhost:{page.port}")[0] == 200
    assert page.ask(Host=f"localhost:{page.port}", Origin=f"http://localhost:{page.port}")[0] == 200


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "",
        "http://127.0.0.1",
        "http://127.0.0.1:1",
        "https://127.0.0.1:{port}",
        "http://localhost:{port}",
        "http://127.0.0.1:{port}.evil.example",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_another_origin_is_refused(page: Page, origin: str, method: str) -> None:
    _refused(page, 403, "Another website", "/count", method, Origin=origin.format(port=page.port))


@pytest.mark.parametrize("site", ["cross-site", "same-site", "anything"])
def test_what_the_browser_calls_another_site_is_refused(page: Page, site: str) -> None:
    _refused(page, 403, "Another website", Sec_Fetch_Site=site)
    _refused(page, 403, "Another website", f"/?token={page.token}", Sec_Fetch_Site=site)


def test_the_page_itself_is_answered(page: Page) -> None:
    origin = f"http://127.0.0.1:{page.port}"
    assert page.ask("/count", "POST", b"", Origin=origin, Sec_Fetch_Site="same-origin")[0] == 200
    assert page.ask(Sec_Fetch_Site="none")[0] == 200


# --- paths


@pytest.fixture(scope="module")
def root(page: Page) -> Path:
    """A folder with one file to be had, and others that are not."""
    made = page.folder / "root"
    (made / "in").mkdir(parents=True)
    (made / "in" / "a b.txt").write_text("had")
    (page.folder / "secret.txt").write_text("secret")
    (made / "link.txt").symlink_to(page.folder / "secret.txt")
    (made / "near.txt").symlink_to(made / "in" / "a b.txt")
    (made / "linked").symlink_to(page.folder)
    return made


def test_a_file_below_the_root_is_had(page: Page, root: Path) -> None:
    assert page.ask("/files/in/a%20b.txt")[:2] == (200, '"had"')


@pytest.mark.parametrize(
    "path",
    [
        "../secret.txt",
        "in/../../secret.txt",
        "%2e%2e/secret.txt",
        "%2E%2E/secret.txt",
        ".%2e/secret.txt",
        "..%2fsecret.txt",
        "%2e%2e%2fsecret.txt",
        "..%5csecret.txt",
        "..\\secret.txt",
        "%252e%252e/secret.txt",
        "./in/a%20b.txt",
        "in/./a%20b.txt",
        "/etc/passwd",
        "//etc/passwd",
        "%2fetc%2fpasswd",
        "{absolute}",
        "link.txt",
        "near.txt",
        "linked/secret.txt",
        "in",
        "in/",
        "in//a%20b.txt",
        "",
        "missing.txt",
        "in/a%20b.txt%00.png",
        "in/a%20b.txt/",
        "x" * 5000,
    ],
)
def test_nothing_outside_the_root_is_had(page: Page, root: Path, path: str) -> None:
    status, text, _ = page.ask("/files/" + path.format(absolute=page.folder / "secret.txt"))
    assert status == 404
    assert "no such file" in text
    assert "secret" not in text


CLIMBING = [
    "/../count",
    "/files/../count",
    "/%2e%2e/count",
    "/./count",
    "/a\\count",
    "/a%5ccount",
    "/files%2fa",
    "/count%00",
]


@pytest.mark.parametrize("path", CLIMBING)
def test_a_path_that_climbs_reaches_no_route_at_all(page: Page, path: str) -> None:
    _refused(page, 404, "no such file", path)


@pytest.mark.parametrize(
    "relative", ["..", "../x", "/x", "in/..", "", "in\\x", "in\0x", "link.txt", "linked/secret.txt", "in"]
)
def test_safe_file_refuses_by_itself(root: Path, relative: str) -> None:
    with pytest.raises(HTTPException) as refusal:
        safe_file(root, relative)
    assert refusal.value.status_code == 404


def test_safe_file_finds_what_is_there(root: Path) -> None:
    assert safe_file(root, "in/a b.txt") == root / "in" / "a b.txt"


# --- bodies


def test_a_body_up_to_the_limit_is_taken(page: Page) -> None:
    assert page.ask("/count", "POST", b"x" * BODY_LIMIT)[:2] == (200, str(BODY_LIMIT))


def test_a_longer_body_is_refused_by_what_it_says_before_it_comes(page: Page) -> None:
    _refused(page, 413, "64 KiB", "/count", "POST", Content_Length=str(BODY_LIMIT + 1))
    _refused(page, 413, "64 KiB", "/count", "POST", Content_Length="9" * 15)


def _chunked(page: Page, size: int) -> bytes:
    lines = [
        "POST /count HTTP/1.1",
        f"Host: 127.0.0.1:{page.port}",
        f"Cookie: xfed-{page.port}={page.token}",
        f"X-Xfed-Token: {page.token}",
        "Transfer-Encoding: chunked",
        "",
        "",
    ]
    with socket.create_connection(("127.0.0.1", page.port), timeout=10) as line:
        line.sendall("\r\n".join(lines).encode())
        try:
            for start in range(0, size, 8192):
                part = b"x" * min(8192, size - start)
                line.sendall(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            line.sendall(b"0\r\n\r\n")
        except OSError:  # refused in the middle
            pass
        return line.recv(65536)


def test_a_longer_body_in_chunks_is_refused_while_it_comes(page: Page) -> None:
    before = page.ran
    assert _chunked(page, BODY_LIMIT + 1).startswith(b"HTTP/1.1 413")
    assert _chunked(page, 40 * BODY_LIMIT).startswith(b"HTTP/1.1 413")
    assert page.ran == before
    assert _chunked(page, BODY_LIMIT).startswith(b"HTTP/1.1 200")


def test_half_a_body_reaches_no_route(page: Page) -> None:
    before = page.ran
    with socket.create_connection(("127.0.0.1", page.port), timeout=10) as line:
        head = f"POST /count HTTP/1.1\r\nHost: 127.0.0.1:{page.port}\r\nCookie: xfed-{page.port}={page.token}\r\n"
        line.sendall(f"{head}X-Xfed-Token: {page.token}\r\nContent-Length: 100\r\n\r\nhalf".encode())
    assert page.ask()[0] == 200
    assert page.ran == before + 1


# --- answers


@pytest.mark.parametrize(
    "path", ["/", "/count", "/assets/page.js", "/nothing", "/assets/nothing", "/broken", "/favicon.ico"]
)
def test_every_answer_forbids_the_browser_to_go_elsewhere(page: Page, path: str) -> None:
    headers = page.ask(path)[2]
    assert headers["content-security-policy"] == CSP == HEADERS["content-security-policy"]
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert "server" not in headers


def test_no_pages_that_describe_the_interface(page: Page) -> None:
    assert {page.ask(path)[0] for path in ("/docs", "/redoc", "/openapi.json")} == {404}


def test_an_error_of_ours_is_answered_in_its_words(page: Page) -> None:
    assert page.ask("/broken")[:2] == (500, '{"detail":"the store is gone: import again"}')


# --- the server


def test_only_loopback_listens(page: Page) -> None:
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        address, port = line.split()[1].split(":")
        if int(port, 16) == page.port and line.split()[3] == "0A":
            assert address == "0100007F"
            break
    else:
        pytest.fail("the page's port is not listed")


def test_a_port_in_use_is_said(page: Page) -> None:
    with pytest.raises(StorageError, match=f"127.0.0.1:{page.port}.*--port"):
        serve_page(page.app, port=page.port, announce=print)


SERVE = """
from xfed.common.pages import page_app, serve_page
serve_page(lambda token, port: page_app(title="t", token=token, port=port), port=0, announce=lambda url: print(url, flush=True))
print("ended", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_well_when_it_is_told_to(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SERVE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        killer = threading.Timer(120, process.kill)
        killer.start()
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            with httpx.Client(trust_env=False) as client:  # a connection that stays open must not hold it up
                assert client.get(url).status_code == 303
                process.send_signal(number)
                out, err = process.communicate(timeout=30)
        finally:
            killer.cancel()
            process.kill()
        assert (process.returncode, out, err) == (0, "ended\n", "")
