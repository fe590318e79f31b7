"""The real app on two small real runs, and a headless Chromium that may only talk to it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import TINY
from trainer.__main__ import main
from trainer.runlog import list_runs

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playwright.sync_api import Browser, ConsoleMessage, Page, Route  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

OpenPage = Callable[..., Page]


# Only as long as these tests run: Playwright leaves an event loop running in the main thread.
@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="session")
def runs_dir(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """A trunk and two finetunes from it, by the real command line, in process."""
    runs = tmp_path_factory.mktemp("runs")
    common = ["--data", str(photos), "--runs-dir", str(runs), "--epochs", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THAW_CACHE", str(tmp_path_factory.mktemp("cache")))
        assert main([*common, "--phase", "transfer", "--run-name", "trunk", *TINY]) == 0
        finetune = [*common, "--phase", "finetune", "--from", list_runs(runs)[0].run_id]
        for name, rate in (("gentle", "1e-5"), ("bold", "1e-3")):
            assert main([*finetune, "--lr", rate, "--run-name", name]) == 0
    return runs


@pytest.fixture(scope="package")
def app(runs_dir: Path) -> Iterator[str]:
    """The address of the app on `runs_dir`."""
    with serve(runs_dir) as address:
        yield address


@contextmanager
def serve(runs_dir: Path) -> Iterator[str]:
    """Run the app as a user does, until the block ends."""
    port = _free_port()
    command = [sys.executable, "-m", "streamlit", "run", "streamlit_app.py"]
    command += ["--server.port", str(port), "--server.headless", "true"]
    command += ["--", "--runs-dir", str(runs_dir)]
    address = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            _wait_for(f"{address}/_stcore/health")
            yield address
        finally:
            process.terminate()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(url: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def _is_ours(message: ConsoleMessage) -> bool:
    # Opened at /runs, Streamlit's own front end first looks for its server under /runs.
    return message.type == "error" and "/_stcore/" not in message.location["url"]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """open_page(address, width=1400, scheme="light") -> the page, with its header in place.

    When the test is over it fails if the page logged an error or asked another host for anything.
    """
    contexts, problems = [], list[str]()

    def guard(route: Route) -> None:
        if urlsplit(route.request.url).hostname == "127.0.0.1":
            route.continue_()
        else:
            problems.append(f"external request: {route.request.url}")
            route.abort()

    def open_(address: str, width: int = 1400, scheme: str = "light") -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": 1300},
            color_scheme=scheme,  # type: ignore[arg-type]
        )
        contexts.append(context)
        page = context.new_page()
        page.route("http*://**/*", guard)
        page.on("console", lambda m: problems.append(m.text) if _is_ours(m) else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        page.wait_for_selector("h2", timeout=60_000)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert problems == []
