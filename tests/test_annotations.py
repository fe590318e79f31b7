"""What users note of runs: kept beside the run, cleaned, and never in the way of reading it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from explorer.annotations import (
    ANNOTATIONS_JSON,
    MAX_NAME,
    MAX_NOTE,
    MAX_TAGS,
    Annotation,
    clean,
    load_annotation,
    save_annotation,
)
from trainer.runlog import RunError


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    noted = Annotation("Best so far", "two\nlines, größer", ("paper", "a b"), True)
    save_annotation(tmp_path, noted)
    assert load_annotation(tmp_path) == noted
    assert [path.name for path in tmp_path.iterdir()] == [ANNOTATIONS_JSON]


def test_what_is_typed_is_cleaned() -> None:
    noted = clean("  my\n run ", " a\r\nb \n", ["x", " x ", "", "two\twords", "y"], False)
    assert noted == Annotation("my run", "a\nb", ("x", "two words", "y"), False)


def test_nothing_gets_too_long() -> None:
    noted = clean("n" * 500, "t" * 5000, [f"tag {n}" * 50 for n in range(50)], False)
    assert len(noted.name) == MAX_NAME
    assert len(noted.note) == MAX_NOTE
    assert len(noted.tags) == MAX_TAGS
    assert max(map(len, noted.tags)) == MAX_NAME


@pytest.mark.parametrize("unfit", ["\x00", "\x1b", "\x7f", "\u202e", "\u2066", "\ud800"])
def test_what_no_browser_can_be_sent_is_left_out(tmp_path: Path, unfit: str) -> None:
    text = json.dumps({"name": f"a{unfit}b", "note": unfit, "tags": [unfit, f"x{unfit}"]})
    (tmp_path / ANNOTATIONS_JSON).write_text(text)
    assert load_annotation(tmp_path) == Annotation("ab", "", ("x",))
    save_annotation(tmp_path, load_annotation(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[1]",
        b"null",
        b'{"name": 3, "note": [], "tags": "x", "archived": "yes"}',
        b'{"tags": [1, null, {}]}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_counts_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ANNOTATIONS_JSON).write_bytes(content)
    assert load_annotation(tmp_path) == Annotation()


def test_where_nothing_can_be_written_the_path_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(RunError, match=f"{gone / ANNOTATIONS_JSON}: No such file"):
        save_annotation(gone, Annotation("x"))
