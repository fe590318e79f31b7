"""The pages and their navigation: what runs for each visitor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import streamlit as st

from explorer.loading import load
from explorer.pages import sign_in

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
    if not sign_in.admitted():
        return
    load()
    from explorer.pages.parts import opener

    pages = [
        st.Page(opener(name), title=title, url_path=name, default=name == "compare")
        for name, title in _TITLES.items()
    ]
    if sign_in.is_required():
        pages.append(st.Page(sign_in.page, title="Account", url_path="account"))
    st.navigation(pages, position="top").run()


if __name__ == "__main__":
    main()
