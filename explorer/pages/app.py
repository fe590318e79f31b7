"""The pages and their navigation: what runs for each visitor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import streamlit as st

from explorer.loading import load

if TYPE_CHECKING:
    from explorer.pages.parts import PageName

_TITLES: Final[dict[PageName, str]] = {
    "compare": "Compare",
    "runs": "Runs",
    "sweep": "Sweep",
    "results": "Results",
    "changed": "What changed",
    "classify": "Classify",
    "exporting": "Export",
    "importing": "Import",
}


def main() -> None:
    st.set_page_config(page_title="Thaw", layout="wide")
    load()
    from explorer.pages.parts import opener

    pages = [
        st.Page(opener(name), title=title, url_path=name, default=name == "compare")
        for name, title in _TITLES.items()
    ]
    st.navigation(pages, position="top").run()


if __name__ == "__main__":
    main()
