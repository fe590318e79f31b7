"""The pages and their navigation: what runs for each visitor."""

from __future__ import annotations

import streamlit as st

from explorer.pages import changed, classify, compare, export, importing, runs, sweep


def main() -> None:
    st.set_page_config(page_title="Thaw", layout="wide")
    pages = [
        st.Page(compare.page, title="Compare", url_path="compare", default=True),
        st.Page(runs.page, title="Runs", url_path="runs"),
        st.Page(sweep.page, title="Sweep", url_path="sweep"),
        st.Page(changed.page, title="What changed", url_path="changed"),
        st.Page(classify.page, title="Classify", url_path="classify"),
        st.Page(export.page, title="Export", url_path="export"),
        st.Page(importing.page, title="Import", url_path="importing"),
    ]
    st.navigation(pages, position="top").run()


if __name__ == "__main__":
    main()
