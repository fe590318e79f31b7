"""Sign-in with a real OpenID Connect provider, a tiny one on this machine. Needs Authlib:
`pip install 'streamlit[auth]'`."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from tests.browser.conftest import _free_port
from tests.browser.test_app_config import started
from tests.explorer_runs import write_trunk
from tests.streamlit_client import Visitor

pytest.importorskip("authlib", reason="Authlib is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from joserfc import jwt  # noqa: E402
from joserfc.jwk import RSAKey  # noqa: E402
from playwright.sync_api import Browser, Page, expect  # noqa: E402

pytestmark = [pytest.mark.browser, pytest.mark.slow]

SECRETS = """
[auth]
redirect_uri = "{app}/oauth2callback"
cookie_secret = "a secret of more than fourteen bytes"
client_id = "thaw"
client_secret = "not so secret"
server_metadata_url = "{provider}/.well-known/openid-configuration"

[thaw]
allowed = ["@example.org"]
"""


class Provider(http.server.BaseHTTPRequestHandler):
    """Knows one person, and believes that it is them."""

    key = RSAKey.generate_key(2048, {"kid": "1", "alg": "RS256", "use": "sig"})
    email = "ann@example.org"
    nonces: ClassVar[dict[str, str]] = {}

    def do_GET(self) -> None:
        place = urlsplit(self.path)
        asked = {name: values[0] for name, values in parse_qs(place.query).items()}
        here = f"http://{self.headers['Host']}"
        if place.path == "/authorize":
            code = f"code-{len(self.nonces)}"
            self.nonces[code] = asked["nonce"]
            back = urlencode({"code": code, "state": asked["state"]})
            self.send_response(302)
            self.send_header("Location", f"{asked['redirect_uri']}?{back}")
            self.end_headers()
        elif place.path == "/jwks":
            self._say({"keys": [self.key.as_dict(private=False)]})
        else:
            ends = {"authorization": "authorize", "token": "token"}
            self._say(
                {f"{name}_endpoint": f"{here}/{end}" for name, end in ends.items()}
                | {"issuer": here, "jwks_uri": f"{here}/jwks"}
                | {"id_token_signing_alg_values_supported": ["RS256"]}
            )

    def do_POST(self) -> None:
        body = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        now = int(time.time())
        claims = {
            "iss": f"http://{self.headers['Host']}",
            "sub": "1",
            "aud": "thaw",
            "iat": now,
            "exp": now + 300,
            "nonce": self.nonces[body["code"][0]],
            "email": self.email,
            "email_verified": True,
        }
        token = jwt.encode({"alg": "RS256", "kid": "1"}, claims, self.key)
        self._say({"access_token": "x", "token_type": "Bearer", "id_token": token})

    def _say(self, content: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def provider() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Provider) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def app(tmp_path: Path) -> Iterator[str]:
    write_trunk(tmp_path / "runs", "confidential")
    port = _free_port()
    home = tmp_path / "home" / ".streamlit"
    home.mkdir(parents=True)
    with provider() as address:
        here = f"http://127.0.0.1:{port}"
        (home / "secrets.toml").write_text(SECRETS.format(app=here, provider=address))
        with started(home.parent, tmp_path / "runs", port=port):
            yield here


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context()
    yield context.new_page()
    context.close()


def test_a_visitor_signs_in_and_out(app: str, page: Page) -> None:
    page.goto(f"{app}/runs")
    button = page.get_by_role("button", name="Sign in")
    expect(button).to_be_visible(timeout=60_000)
    assert "confidential" not in page.content()
    expect(page.get_by_role("link", name="Runs")).to_have_count(0)
    button.click()
    expect(page.get_by_role("heading", name="Did unfreezing help")).to_be_visible(timeout=60_000)
    page.get_by_role("link", name="Account").click()
    expect(page.get_by_text("Signed in as ann@example.org.")).to_be_visible()
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("button", name="Sign in")).to_be_visible(timeout=60_000)
    page.goto(app)
    expect(page.get_by_role("button", name="Sign in")).to_be_visible(timeout=60_000)


def test_who_is_not_on_the_list_sees_nothing(
    app: str, page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Provider, "email", "eve@example.com")
    page.goto(app)
    page.get_by_role("button", name="Sign in").click(timeout=60_000)
    expect(page.get_by_text("this explorer is not open to you")).to_be_visible(timeout=60_000)
    assert "confidential" not in page.content()


def test_a_forged_cookie_is_worth_nothing(app: str) -> None:
    claims = {"is_logged_in": True, "email": "ann@example.org", "origin": app, "provider": "x"}
    with Visitor(app, cookies={"_streamlit_user": json.dumps(claims)}) as visitor:
        visitor.open("runs")
        assert visitor.says("Sign in to see the runs.")
        assert not visitor.says("confidential")
