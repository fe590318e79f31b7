"""The photos that unfreezing fixed and broke, and their files, which nobody vouches for."""

from __future__ import annotations

import io
from pathlib import Path, PurePosixPath
from typing import Final, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from explorer.changed import Change
from trainer.preprocess import PhotoError, is_photo, open_photo

Outcome = Literal["fixed", "broken", "wrong", "right"]

_SIDE: Final = 280  # pixels of a thumbnail's longer side, at most


def photo_table(change: Change) -> pd.DataFrame:
    """One row for each photo, the largest change of the true class's probability first.

    Columns: file, true, before, after (names), confidence_before, confidence_after (of the class
    predicted), true_before, true_after (probability of the true class), gain, outcome.
    """
    names = np.array(change.classes, dtype=object)
    before, after = change.before, change.after
    chances = np.exp(before.true_log), np.exp(after.true_log)
    frame = pd.DataFrame(
        {
            "file": pd.Series(before.files, dtype=object),  # may hold what is not UTF-8
            "true": names[before.labels],
            "before": names[before.predicted],
            "after": names[after.predicted],
            "confidence_before": before.confidence,
            "confidence_after": after.confidence,
            "true_before": chances[0],
            "true_after": chances[1],
            "gain": chances[1] - chances[0],
            "outcome": _outcomes(before.right, after.right),
        }
    )
    order = frame["gain"].abs().sort_values(ascending=False, kind="stable").index
    return frame.loc[order].reset_index(drop=True)


def _outcomes(was: NDArray[np.bool_], now: NDArray[np.bool_]) -> NDArray[np.str_]:
    return np.select([now & ~was, was & ~now, ~was & ~now], ["fixed", "broken", "wrong"], "right")


def chosen_photos(
    photos: pd.DataFrame,
    outcome: Outcome | None = None,
    true: str | None = None,
    before: str | None = None,
    after: str | None = None,
) -> pd.DataFrame:
    """The rows of a photo_table with this outcome, true class and answers; None: any."""
    wanted = {"outcome": outcome, "true": true, "before": before, "after": after}
    hits = pd.Series(True, index=photos.index)
    for column, value in wanted.items():
        if value is not None:
            hits &= photos[column] == value
    return photos[hits]


def photo_path(root: Path, file: str) -> Path:
    """Where a photo named in predictions lies. Raises PhotoError with the reason.

    Names come from a file that anybody may have made: nothing outside `root` is opened.
    """
    named = PurePosixPath(file)
    if named.is_absolute() or ".." in named.parts or "\0" in file:
        raise PhotoError("its name leads out of the photo folder")
    if not is_photo(Path(named.name)):
        raise PhotoError("its name has no suffix of a photo")
    try:
        resolved = (root / named).resolve()
        inside = resolved.is_relative_to(root.resolve())
        there = inside and resolved.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise PhotoError(f"it cannot be found: {error}") from None
    if not inside:
        raise PhotoError("it is a link that leads out of the photo folder")
    if not there:
        raise PhotoError("it is not in the photo folder any more")
    if not is_photo(resolved):
        raise PhotoError("it is a link to something that is no photo")
    return resolved


def small_jpeg(path: Path) -> bytes:
    """A thumbnail of a photo, as JPEG. Raises PhotoError."""
    image = open_photo(path, _SIDE)
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
