"""What a user does: look at curves, single one out, switch the axis, classify a photo."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.browser.conftest import OpenPage

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playwright.sync_api import Locator, Page, expect  # noqa: E402

pytestmark = pytest.mark.browser

LINES = (
    "chart => [...chart.querySelectorAll('.mark-line path')].map(line => line.getAttribute('{}'))"
)
CLASSES = {"red", "green", "blue"}


def chart(page: Page, place: int = 0) -> Locator:
    """The accuracy (0) or loss (1) chart, drawn."""
    found = page.get_by_test_id("stVegaLiteChart").nth(place)
    expect(found.locator(".mark-line path").first).to_be_attached(timeout=60_000)
    return found


def legend_entry(of: Locator, name: str) -> Locator:
    return of.locator(".role-legend-label text", has_text=re.compile(f"^{name}$"))


def solid_lines(of: Locator) -> dict[str, str]:
    """Colour -> opacity of the run's lines."""
    colours, opacities = (of.evaluate(LINES.format(name)) for name in ("stroke", "opacity"))
    return dict(zip(colours, opacities, strict=True))


def test_a_click_in_the_legend_brings_a_run_out(app: str, open_page: OpenPage) -> None:
    page = open_page(app)
    accuracy = chart(page)
    assert set(solid_lines(accuracy).values()) == {"1"}
    assert len(solid_lines(accuracy)) == 3  # the trunk once, and two finetunes
    accuracy.hover()  # the pointer's layer must not swallow the click that follows
    legend_entry(accuracy, "bold").click(force=True)
    expect(accuracy.locator('.mark-line path[opacity="1"]')).to_have_count(2)  # train, validation
    faded = solid_lines(accuracy)
    assert sorted(faded.values()) == ["0.1", "0.1", "1"]
    legend_entry(accuracy, "bold").click(force=True)
    expect(accuracy.locator('.mark-line path[opacity="1"]')).to_have_count(6)


def test_the_tooltip_names_the_nearest_point(app: str, open_page: OpenPage) -> None:
    page = open_page(app)
    accuracy = chart(page)
    accuracy.hover()
    tooltip = page.locator("#vg-tooltip-element.visible")
    expect(tooltip).to_contain_text("Accuracy")
    expect(tooltip).to_contain_text("Phase")


def test_the_axis_switches_and_the_link_keeps_it(app: str, open_page: OpenPage) -> None:
    page = open_page(app)
    title = chart(page).locator(".role-axis-title")
    expect(title).to_have_text("Epoch")
    page.get_by_test_id("stButtonGroup").get_by_text("Since unfreeze").click()
    expect(title).to_have_text("Epochs since unfreezing")
    expect(chart(page).locator(".role-axis-label text", has_text="−2")).to_be_visible()
    assert "axis=Since" in page.url
    again = open_page(page.url)
    expect(chart(again).locator(".role-axis-title")).to_have_text("Epochs since unfreezing")


@pytest.mark.slow
def test_colour_and_dash_stand_for_settings_and_the_link_keeps_it(
    app: str, open_page: OpenPage
) -> None:
    page = open_page(f"{app}?colour=Learning+rate&dash=Learning+rate")
    accuracy = chart(page)
    expect(legend_entry(accuracy, "1e-3").first).to_be_attached()
    expect(accuracy.locator(".role-legend-title", has_text="Learning rate").first).to_be_attached()
    widths = set(accuracy.evaluate(LINES.format("stroke-width")))
    assert widths == {"2.5", "0.9"}  # dashes are taken, so training is thinner
    page.get_by_role("button", name="More").click()
    expect(page.get_by_role("combobox", name="Colour stands for")).to_have_value("Learning rate")


def test_ctrl_and_the_wheel_zoom_and_a_double_click_shows_all(
    app: str, open_page: OpenPage
) -> None:
    page = open_page(app)
    accuracy = chart(page)
    first_epoch = accuracy.locator(".role-axis-label text", has_text=re.compile("^0$"))
    expect(first_epoch).to_have_count(1)
    band = accuracy.locator(".mark-rect").first
    band.hover(force=True)  # through the transparent layer that finds the nearest point
    page.mouse.wheel(0, -300)
    page.wait_for_timeout(300)
    expect(first_epoch).to_have_count(1)  # the wheel alone scrolls the page
    band.hover(force=True)  # through the transparent layer that finds the nearest point
    page.keyboard.down("Control")
    page.mouse.wheel(0, -600)
    page.keyboard.up("Control")
    expect(first_epoch).to_have_count(0)
    band.dblclick(force=True)
    expect(first_epoch).to_have_count(1)


def test_before_and_after_stand_side_by_side(app: str, open_page: OpenPage) -> None:
    page = open_page(f"{app}?axis=Before+and+after")
    titles = [chart(page, place).locator(".role-title-text") for place in range(4)]
    for title, words in zip(titles, ("Accuracy", "Accuracy", "Loss", "Loss"), strict=True):
        expect(title).to_contain_text(words)
    boxes = [chart(page, place).bounding_box() for place in (0, 1)]
    assert boxes[0] is not None
    assert boxes[1] is not None
    assert boxes[0]["y"] == boxes[1]["y"]


@pytest.mark.slow
def test_a_chart_can_be_had_as_svg(app: str, open_page: OpenPage) -> None:
    page = open_page(app)
    chart(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="SVG").first.click()
    assert download.value.suggested_filename == "thaw-chart-accuracy.svg"
    assert download.value.path().read_text().startswith("<svg")


def test_ticked_runs_are_compared(app: str, open_page: OpenPage) -> None:
    page = open_page(f"{app}/runs?search=finetune")  # what is in the link must not be in the way
    expect(page.get_by_role("heading", name="Which runs are there")).to_be_visible()
    table = page.get_by_test_id("stDataFrame").locator("canvas").first
    expect(table).to_be_visible()
    for row in (1, 2):  # under the header: the newest run, and the one before
        # By force: a transparent layer for scrolling lies on top, and hands the click on.
        table.click(position={"x": 20, "y": 35 * row + 17}, force=True)
    page.get_by_role("button", name="Compare (2)").click()
    accuracy = chart(page)
    assert page.url.count("runs=") == 2
    expect(legend_entry(accuracy, "bold")).to_be_attached()
    expect(legend_entry(accuracy, "gentle")).to_be_attached()


def test_a_photo_is_classified_before_and_after(
    app: str, open_page: OpenPage, photos: Path
) -> None:
    page = open_page(app)
    page.get_by_role("link", name="Classify").click()
    page.locator("input[type=file]").set_input_files(photos / "red" / "000.jpg")
    answers = page.get_by_test_id("answer")
    expect(answers).to_have_count(2, timeout=60_000)
    assert set(answers.all_inner_texts()) <= CLASSES
    expect(page.get_by_text(re.compile("^(same answer|answers differ)$"))).to_be_visible()
    expect(page.locator(".thaw-bar")).to_have_count(6)  # three classes, twice


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_without_sideways_scrolling(
    app: str, open_page: OpenPage, scheme: str
) -> None:
    page = open_page(app, width=390, scheme=scheme)
    for place in (0, 1):
        box = chart(page, place).bounding_box()
        assert box is not None
        assert box["x"] + box["width"] <= 390
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
