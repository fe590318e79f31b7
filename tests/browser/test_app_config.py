"""What the app lets in: the settings say so, and the real server does it. No browser is needed."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.browser.conftest import ROOT, _free_port, _wait_for, serve
from tests.explorer_runs import write_trunk
from tests.streamlit_client import Visitor

LARGEST = 20 * 2**20


def test_the_settings() -> None:
    settings = tomllib.loads((ROOT / ".streamlit/config.toml").read_text())
    server, client = settings["server"], settings["client"]
    assert server["address"] == "127.0.0.1"
    assert server["allowedHosts"] == ["localhost", "127.0.0.1", "::1"]
    assert server["maxUploadSize"] == 20
    assert server["enableXsrfProtection"] is True
    assert server["enableCORS"] is True
    assert server["enableAgentApi"] is False
    assert server["enableStaticServing"] is False
    assert client["showErrorDetails"] == "none"
    assert client["showErrorLinks"] is False
    assert client["allowedOrigins"] == []
    assert settings["browser"]["gatherUsageStats"] is False


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    runs = tmp_path_factory.mktemp("runs")
    write_trunk(runs)
    with serve(runs) as address:
        yield address


def handshake(address: str, origin: str, host: str = "") -> int:
    """The status with which the server answers a websocket of a page from `origin`."""
    place = urlsplit(address)
    connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=30)
    connection.putrequest("GET", "/_stcore/stream", skip_host=True)
    for name, value in {
        "Host": host or place.netloc,
        "Origin": origin,
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Protocol": "streamlit",
    }.items():
        connection.putheader(name, value)
    connection.endheaders()
    with connection.getresponse() as answer:
        return answer.status


def test_only_the_app_s_own_pages_may_talk_to_it(served: str) -> None:
    port = urlsplit(served).port
    assert handshake(served, served) == 101
    assert handshake(served, f"http://localhost:{port}", f"localhost:{port}") == 101
    assert handshake(served, "http://evil.example") == 403
    assert handshake(served, "null") == 403
    # A page whose name is turned to 127.0.0.1 once it is loaded (DNS rebinding).
    assert handshake(served, f"http://evil.example:{port}", f"evil.example:{port}") == 403


def upload(address: str, path: str, content: bytes, cookie: str, token: str) -> int:
    place = urlsplit(address)
    connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=60)
    head = b'--x\r\nContent-Disposition: form-data; name="f"; filename="a.jpg"\r\n\r\n'
    body = head + content + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x", "Cookie": cookie}
    headers |= {"X-Xsrftoken": token} if token else {}
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before all was sent
        connection.request("PUT", path, body, headers)
    with connection.getresponse() as answer:
        return answer.status


def test_uploads_are_limited_and_need_a_session_of_this_app(served: str) -> None:
    with Visitor(served) as visitor:
        visitor.open("classify")
        path = f"/_stcore/upload_file/{visitor.session_id}/one"
        token = visitor.cookie.partition("=")[2].strip('"')
        assert upload(served, path, bytes(1000), visitor.cookie, token) == 204
        assert upload(served, path, bytes(LARGEST + 1), visitor.cookie, token) == 413
        assert upload(served, path, bytes(1000), visitor.cookie, "") == 403
        assert upload(served, path, bytes(1000), "", token) == 403
        nobody = "/_stcore/upload_file/nobody/one"
        assert upload(served, nobody, bytes(1000), visitor.cookie, token) == 400


def get(address: str, path: str) -> tuple[int, http.client.HTTPMessage]:
    place = urlsplit(address)
    connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=30)
    connection.request("GET", path)
    with connection.getresponse() as answer:
        return answer.status, answer.headers


def test_every_answer_keeps_the_browser_here(served: str) -> None:
    for path in ("/", "/runs", "/_stcore/health", "/nothing/such", "/media/none"):
        _, headers = get(served, path)
        assert "default-src 'self'" in headers["Content-Security-Policy"], path
        assert headers["X-Content-Type-Options"] == "nosniff"
    for path in ("/_stcore/agent/interact", "/_stcore/agent/mcp"):
        assert get(served, path)[0] >= 400
    for path in ("/../streamlit_app.py", "/media/../../etc/passwd", "/app/static/../explorer/x.py"):
        status, headers = get(served, path)
        # For any path that it does not know Streamlit sends its own page.
        assert status >= 400 or headers["Content-Type"].startswith("text/html"), path


def listening_at(port: int) -> set[str]:
    """The addresses at which somebody listens on a port, as Linux tells them."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    lines += Path("/proc/net/tcp6").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    found = {one[1].split(":")[0] for one in fields if one[1].endswith(f":{port:04X}")}
    return {socket.inet_ntoa(bytes.fromhex(one)[::-1]) if len(one) == 8 else one for one in found}


@contextlib.contextmanager
def started(folder: Path, runs: Path, *flags: str, port: int = 0) -> Iterator[str]:
    """The app, started from another folder than its own."""
    port = port or _free_port()
    command = [sys.executable, "-m", "streamlit", "run", str(ROOT / "streamlit_app.py")]
    command += ["--server.port", str(port), "--server.headless", "true", *flags]
    environment = {k: v for k, v in os.environ.items() if k != "THAW_READ_ONLY"}
    with subprocess.Popen(
        [*command, "--", "--runs-dir", str(runs)],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
    ) as process:
        try:
            _wait_for(f"http://127.0.0.1:{port}/_stcore/health")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def test_only_this_machine_can_reach_it(served: str) -> None:
    assert listening_at(urlsplit(served).port or 0) == {"127.0.0.1"}


@pytest.mark.slow
def test_from_another_folder_the_settings_are_the_same(tmp_path: Path) -> None:
    write_trunk(tmp_path / "runs")
    (tmp_path / "home").mkdir()
    with started(tmp_path / "home", tmp_path / "runs") as address:
        assert listening_at(urlsplit(address).port or 0) == {"127.0.0.1"}
        assert handshake(address, "http://evil.example") == 403
        with Visitor(address) as visitor:
            visitor.open("classify")
            path = f"/_stcore/upload_file/{visitor.session_id}/one"
            token = visitor.cookie.partition("=")[2].strip('"')
            assert upload(address, path, bytes(LARGEST + 1), visitor.cookie, token) == 413


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [("--server.address", "0.0.0.0"), ("--server.enableXsrfProtection", "false")]
)
def test_an_app_that_is_less_safe_than_it_was_is_read_only(
    tmp_path: Path, flags: tuple[str, str]
) -> None:
    run = write_trunk(tmp_path / "runs")
    with started(tmp_path, tmp_path / "runs", *flags) as address, Visitor(address) as visitor:
        shown = visitor.open("runs", ticked=run)
        assert shown.errors == ()
        assert visitor.says("Runs cannot be renamed, archived or deleted here.")
