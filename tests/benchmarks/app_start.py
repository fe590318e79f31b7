"""How long the app takes to open, cold: server, page header, curves.

    python -m tests.benchmarks.app_start [--runs-dir DIR] [--starts 5]

Starts a new server each time and opens its first page in headless Chromium; the browser itself is
running already. Prints seconds from the start of `streamlit run`, and their medians.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from tests.browser.conftest import CHROMIUM_FLAGS, serve


def measure(browser: Browser, runs_dir: Path) -> dict[str, float]:
    page = browser.new_context(viewport={"width": 1400, "height": 1000}).new_page()
    started = time.perf_counter()
    with serve(runs_dir) as address:
        seconds = {"server": time.perf_counter() - started}
        page.goto(address)
        for name, selector in (("header", "h2"), ("curves", ".mark-line path")):
            page.wait_for_selector(selector, state="attached", timeout=60_000)
            seconds[name] = time.perf_counter() - started
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--starts", type=int, default=5)
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        executable = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_FLAGS)
        starts = [measure(browser, arguments.runs_dir.absolute()) for _ in range(arguments.starts)]
        browser.close()
    medians = {name: statistics.median(s[name] for s in starts) for name in starts[0]}
    print(json.dumps({"median seconds": medians, "all": starts}, indent=2))


if __name__ == "__main__":
    main()
