"""Every page, on a desk and on a phone, in light and dark, and without any runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.browser.conftest import OpenPage, serve

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playwright.sync_api import expect  # noqa: E402

pytestmark = pytest.mark.browser

PAGES = {
    "": "Compare",
    "runs": "Runs",
    "sweep": "Sweep",
    "changed": "What changed",
    "classify": "Classify",
    "exporting": "Export",
    "importing": "Import",
}


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_a_page_fits_its_window_and_shows_no_error(
    app: str, open_page: OpenPage, path: str, width: int, scheme: str
) -> None:
    page = open_page(f"{app}/{path}", width=width, scheme=scheme)
    expect(page.get_by_test_id("stStatusWidget")).to_have_count(0, timeout=60_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    expect(page.get_by_test_id("stException")).to_have_count(0)
    assert page.title() == PAGES[path] or page.title().startswith("Thaw")


@pytest.mark.slow
def test_every_page_says_what_to_type_without_runs(tmp_path: Path, open_page: OpenPage) -> None:
    with serve(tmp_path) as address:
        for path in PAGES:
            page = open_page(f"{address}/{path}")
            expect(page.get_by_test_id("stCode").first).to_contain_text("python -m trainer")
            expect(page.get_by_test_id("stException")).to_have_count(0)


def test_a_click_on_a_cell_shows_its_run_and_leads_to_it(app: str, open_page: OpenPage) -> None:
    page = open_page(f"{app}/sweep")
    heatmap = page.get_by_test_id("stVegaLiteChart").first
    cell = heatmap.locator(".mark-rect.role-mark path").last
    expect(cell).to_be_visible(timeout=60_000)
    cell.click(force=True)
    page.get_by_role("button", name="Compare this run").click()
    expect(page.get_by_role("heading", name="Did unfreezing help")).to_be_visible()
    expect(page.locator(".thaw-verdict")).to_have_count(1)
    assert page.url.count("runs=") == 1


@pytest.mark.slow
def test_photos_that_changed_are_shown_by_link(app: str, open_page: OpenPage) -> None:
    page = open_page(f"{app}/changed")
    page.get_by_test_id("stButtonGroup").get_by_text("Confusions").click()
    expect(page.get_by_test_id("stVegaLiteChart").first).to_be_visible(timeout=60_000)
    again = open_page(page.url)
    expect(again.get_by_test_id("stVegaLiteChart").first).to_be_visible(timeout=60_000)


@pytest.mark.slow
def test_a_run_can_be_renamed_and_deleted_after_asking(
    runs_dir: Path, tmp_path: Path, open_page: OpenPage
) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(runs_dir, runs)
    bold = next(path.name for path in runs.iterdir() if path.name.endswith("bold"))
    with serve(runs) as address:
        page = open_page(f"{address}/runs?ticked={bold}")
        page.get_by_role("button", name="Edit").click()
        page.get_by_label("Name", exact=True).fill("<b>too bold</b>")
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_role("dialog")).to_have_count(0)
        page.goto(f"{address}/runs?ticked={bold}")
        page.get_by_role("button", name="Delete").click()
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("<b>too bold</b>", timeout=30_000)
        assert (runs / bold).exists()
        dialog.get_by_role("button", name="Delete this run").click()
        expect(dialog).to_have_count(0)
        assert not (runs / bold).exists()


def test_a_log_from_elsewhere_becomes_a_run(tmp_path: Path, open_page: OpenPage) -> None:
    log = tmp_path / "history.csv"
    log.write_text(
        "epoch,accuracy,loss,val_accuracy,val_loss\n0,0.5,1,0.4,1.2\n1,0.6,0.9,0.5,1.1\n"
    )
    runs = tmp_path / "runs"
    with serve(runs) as address:
        page = open_page(f"{address}/importing?path={log}")
        page.get_by_role("button", name=re.compile("^Import")).click()
        page.get_by_role("button", name="Compare it").click()
        expect(page.get_by_role("heading", name="Did unfreezing help")).to_be_visible()
        expect(page.locator(".thaw-verdict")).to_have_count(1)


@pytest.mark.slow
def test_the_report_is_one_file(app: str, open_page: OpenPage) -> None:
    page = open_page(app)
    with page.expect_download(timeout=60_000) as download:
        page.get_by_role("button", name="Report").click()
    assert download.value.suggested_filename == "thaw-report.html"
    content = download.value.path().read_text()
    assert "Did unfreezing help?" in content
    assert "<script" not in content
