"""Every page, on a desk and on a phone, in light and dark, and without any runs."""

from __future__ import annotations

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


def test_every_page_says_what_to_type_without_runs(tmp_path: Path, open_page: OpenPage) -> None:
    with serve(tmp_path) as address:
        for path in PAGES:
            page = open_page(f"{address}/{path}")
            expect(page.get_by_test_id("stCode").first).to_contain_text("python -m trainer")
            expect(page.get_by_test_id("stException")).to_have_count(0)
