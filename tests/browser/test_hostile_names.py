"""Hostile names in a real browser: nothing is run, nothing is shown as anything but text, and no
request leaves for any place but the app itself."""

from __future__ import annotations

import http.server
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

import pytest
from PIL import Image

from tests.browser.conftest import serve
from tests.hostile_runs import MARK, PAGES, hostile_names, write_hostile
from trainer.runlog import Run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playwright.sync_api import Browser, Page, Request, expect  # noqa: E402

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@contextmanager
def listening() -> Iterator[tuple[str, list[str]]]:
    """Another place on this machine, and what it was asked for."""
    asked: list[str] = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        do_POST = do_HEAD = do_OPTIONS = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def write_networks(run: Run) -> None:
    """Checkpoints whose classes have these names, and the newest one exported."""
    import torch

    from export.to_onnx import export_run
    from tests.tiny_run import PREPROCESS
    from trainer.checkpoint import Checkpoint, save_checkpoint
    from trainer.model import ModelSpec, build_model

    torch.manual_seed(0)
    spec = ModelSpec("squeezenet1_1", len(run.classes))
    weights = build_model(spec).state_dict()
    parent = run.path.parent / str(run.parent_run_id)
    for path, phase in ((parent, "transfer"), (run.path, "finetune")):
        file = path / "checkpoints" / f"{phase}-{'last' if phase == 'transfer' else 'best'}.pt"
        save_checkpoint(file, Checkpoint(spec, run.classes, PREPROCESS, phase, 5, weights))  # type: ignore[arg-type]
    export_run(run)


def write_data(root: Path, names: list[str]) -> None:
    """The photos of those classes that can be folders."""
    for number, name in enumerate(names):
        if "/" not in name:
            (root / name).mkdir(parents=True)
            for n in (2 * number, 2 * number + 1):
                pixels = (12 * number % 255, 90 * (n % 2), 120)
                Image.new("RGB", (90, 80), pixels).save(root / name / f"{n}.jpg")


def write_logs(root: Path, origin: str, names: list[str]) -> None:
    # A path whose folders make an address: to a browser https:/host/x is https://host/x.
    chain = root / f"![{MARK}](https:" / urlsplit(origin).netloc
    chain.mkdir(parents=True)
    (chain / "x).csv").write_text("photo,label\n")
    for name in (name for name in names if "/" not in name):
        (root / name).mkdir(parents=True)
        (root / name / f"{name[:60]}.csv").write_text("epoch,val_accuracy\n0,0.4\n1,0.5\n")
        (root / name / "other.csv").write_text("photo,label\n")


def visit(page: Page, address: str) -> None:
    page.goto(address)
    page.wait_for_selector("h2", timeout=90_000)
    expect(page.get_by_test_id("stStatusWidget")).to_have_count(0, timeout=90_000)
    for summary in page.get_by_test_id("stExpander").locator("summary").all():
        summary.click()
    for chart in page.get_by_test_id("stVegaLiteChart").all()[:3]:
        chart.hover(force=True)  # tooltips hold names too
    for table in page.get_by_test_id("stDataFrame").all()[:2]:
        table.click(position={"x": 120, "y": 55}, force=True)
    page.wait_for_timeout(300)
    assert page.get_by_test_id("stException").count() == 0
    assert page.evaluate(f"window.{MARK} === undefined")
    for name in ("script", "iframe", "base"):
        inside = page.locator(f".stApp {name}")
        assert inside.count() == 0, inside.first.evaluate("one => one.outerHTML")
    targets = page.locator("img, image, a[href]").evaluate_all(
        "all => all.map(one => one.src || one.href.baseVal || one.href || '')"
    )
    ours = (f"{urlsplit(address).scheme}://{urlsplit(address).netloc}/", "data:", "blob:")
    assert not [target for target in targets if target and not target.startswith(ours)]


def test_names_stay_names_and_nothing_is_asked_of_another_place(
    browser: Browser, tmp_path: Path
) -> None:
    with listening() as (origin, asked):
        names = hostile_names(origin)
        (tmp_path / "runs").mkdir()
        root = tmp_path / "data" / f"<img src=x onerror=alert(1)>![{MARK}](x)"
        write_data(root, names)
        run = write_hostile(tmp_path / "runs", names, str(root))
        write_networks(run)
        write_logs(tmp_path / "logs", origin, names)
        photos = write_photos(tmp_path / "photos", names)
        went, problems = list[str](), list[str]()

        def note(request: Request) -> None:
            if urlsplit(request.url).scheme in ("http", "https", "ws", "wss"):
                went.append(request.url)

        with serve(tmp_path / "runs") as app:
            context = browser.new_context(viewport={"width": 1280, "height": 1600})
            page = context.new_page()
            page.on("request", note)
            page.on("websocket", lambda socket: went.append(socket.url))
            page.on("dialog", lambda dialog: problems.append(dialog.message))
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on(
                "console",
                lambda m: problems.append(m.text) if "Content Security" in m.text else None,
            )
            for path, links in PAGES.items():
                for link in links:
                    whole = link | ({"path": str(tmp_path / "logs")} if path == "importing" else {})
                    whole |= {"ticked" if path == "runs" else "run": run.run_id}
                    where = "" if path == "compare" else path  # the first page
                    visit(page, f"{app}/{where}?{urlencode(whole, quote_via=quote)}")
            visit(page, f"{app}/classify?run={run.run_id}&heat=true")
            page.locator("input[type=file]").set_input_files(photos)
            expect(page.get_by_test_id("answer").first).to_be_visible(timeout=90_000)
            expect(page.get_by_test_id("stStatusWidget")).to_have_count(0, timeout=90_000)
            report = _report(page, app, tmp_path)
            page.goto(report.as_uri())
            page.wait_for_timeout(500)
            context.close()
        assert asked == []
        assert {urlsplit(url).netloc for url in went} == {urlsplit(app).netloc}
        assert problems == []


def write_photos(root: Path, names: list[str]) -> list[Path]:
    root.mkdir()
    found = []
    for number, name in enumerate(name for name in names if "/" not in name):
        path = root / f"{name[:80]}.jpg"
        Image.new("RGB", (90, 80), (40 * number % 255, 90, 120)).save(path, "JPEG")
        found.append(path)
    return found


def _report(page: Page, app: str, folder: Path) -> Path:
    page.goto(app)
    with page.expect_download(timeout=120_000) as download:
        page.get_by_role("button", name="Report").click()
    path = folder / "report.html"
    shutil.copy(download.value.path(), path)
    assert MARK in path.read_text()
    return path
