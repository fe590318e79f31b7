"""From epochs to the points that are drawn: axes, smoothing, means over seeds, marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import pandas as pd

Metric = Literal["accuracy", "loss"]
Axis = Literal["total", "since"]
Split = Literal["Train", "Validation"]
Panel = Literal["before", "after"]

SPLITS: Final[tuple[Split, ...]] = ("Train", "Validation")
RUN: Final = "Run"  # what colour stands for unless a setting is chosen
PHOTOS: Final = "Photos"  # what dashes stand for unless a setting is chosen
COLUMNS: Final = (
    "run",
    "series",
    "phase",
    "epoch",
    "phase_epoch",
    "split",
    "x",
    "value",
    "raw",
    "low",
    "high",
    "seeds",
    "mark",
    "colour",
    "dash",
)
_MOST_POINTS: Final = 400  # of one curve: more than a chart has pixels
_COLUMN: Final[dict[tuple[Metric, Split], str]] = {
    ("accuracy", "Train"): "train_acc",
    ("accuracy", "Validation"): "val_acc",
    ("loss", "Train"): "train_loss",
    ("loss", "Validation"): "val_loss",
}
_AXIS_COLUMN: Final[dict[Axis, str]] = {"total": "epoch", "since": "since_unfreeze"}


@dataclass(frozen=True)
class Look:
    """What colour and dash stand for: RUN and PHOTOS, or a column of the frame (a setting).

    `smoothing` from 0 to below 1 is the weight of the past in an exponential moving average, `log`
    draws the loss on a logarithmic scale.
    """

    colour: str = RUN
    dash: str = PHOTOS
    smoothing: float = 0.0
    log: bool = False


def around_boundary(frame: pd.DataFrame, before: int = 3) -> pd.DataFrame:
    """The epochs after unfreezing and the last `before` ahead of it, where the scale of the first
    epochs would flatten the difference; runs without a boundary stay whole."""
    return frame[frame["boundary"].isna() | (frame["since_unfreeze"] >= -before)]


def panel(frame: pd.DataFrame, which: Panel) -> pd.DataFrame:
    """The epochs up to the boundary, or from it on; a run without one is all before."""
    before = frame["boundary"].isna() | (frame["since_unfreeze"] <= 0)
    if which == "before":
        # The evaluation where a run left its parent is the trunk's last epoch already.
        start = (frame["phase_epoch"] == 0) & (frame["since_unfreeze"] == 0)
        return frame[before & ~(start & (frame["role"] == "run"))]
    return frame[frame["since_unfreeze"] >= 0]


def seed_means(frame: pd.DataFrame, groups: Mapping[str, str]) -> pd.DataFrame:
    """The frame with the runs of one group (by run id) under one name, to be drawn as their mean.

    A trunk belongs to no group and stays by itself.
    """
    group = frame["run_id"].map(dict(groups)).where(frame["role"] == "run")
    return frame.assign(run=group.fillna(frame["run"]), group=group.fillna(frame["run_id"]))


def long_frame(
    frame: pd.DataFrame,
    metric: Metric,
    axis: Axis,
    splits: Sequence[Split],
    look: Look | None = None,
) -> pd.DataFrame:
    """One row per drawn point, with the columns COLUMNS.

    `value` is smoothed within a series, phase and split, `raw` is not. Of a frame from `seed_means`
    it is the mean of its runs, and `low` and `high` the lowest and highest of them. Points that
    were not measured, or have no place on the axis, are absent. On the total axis a trunk that
    selected runs left at several boundaries is there only once. `mark` is "best" for the best
    validation point of a phase, "start" for the evaluation where a run left its parent, or "".
    """
    look = look or Look()
    parts = [frame.assign(split=name, raw=frame[_COLUMN[metric, name]]) for name in splits]
    rows = pd.concat(parts) if parts else frame.assign(split="", raw=float("nan"))
    rows = rows.assign(x=rows[_AXIS_COLUMN[axis]], series=rows.get("group", rows["run_id"]))
    if axis == "total":
        rows = rows.drop_duplicates(["run_id", "split", "phase", "phase_epoch"])
    else:
        rows["series"] += " " + rows["boundary"].astype(str)
    rows = rows.dropna(subset=["x", "raw"])
    rows["colour"] = rows["run"] if look.colour == RUN else rows[look.colour]
    rows["dash"] = rows["split"] if look.dash == PHOTOS else rows[look.dash]
    rows = _means(rows) if "group" in frame else rows.assign(low=rows["raw"], high=rows["raw"])
    rows = rows.assign(seeds=rows.get("seeds", 1)).reset_index(drop=True)
    rows["mark"] = _marks(rows, metric)
    return _thinned(_smoothed(rows, look.smoothing))[list(COLUMNS)]


def _means(rows: pd.DataFrame) -> pd.DataFrame:
    keys = ["series", "phase", "phase_epoch", "split", "x"]
    by_epoch = rows.groupby(keys, as_index=False, sort=False)
    columns = ("run", "role", "epoch", "since_unfreeze", "colour", "dash")
    means = by_epoch.agg(
        **{name: pd.NamedAgg(name, "first") for name in columns},
        val_loss=pd.NamedAgg("val_loss", "mean"),
        run_id=pd.NamedAgg("series", "first"),
        low=pd.NamedAgg("raw", "min"),
        high=pd.NamedAgg("raw", "max"),
        seeds=pd.NamedAgg("raw", "size"),
        mean=pd.NamedAgg("raw", "mean"),
    )
    return means.rename(columns={"mean": "raw"})


def _marks(rows: pd.DataFrame, metric: Metric) -> pd.Series[str]:
    marks = pd.Series("", index=rows.index, dtype="str")
    drawn = rows[(rows["split"] == "Validation") & (rows["role"] == "run")]
    start = (drawn["phase_epoch"] == 0) & (drawn["since_unfreeze"] == 0)
    marks[drawn[start].index] = "start"
    trained = drawn[(drawn["phase_epoch"] > 0) | (drawn["phase"] == "direct")]
    # As the checkpoint was chosen: of several epochs with the highest accuracy, the lowest loss.
    order = ["raw", "val_loss"] if metric == "accuracy" else ["raw"]
    ranked = trained.sort_values(order, ascending=[metric == "loss", True][: len(order)])
    marks[ranked.groupby(["run_id", "phase"]).head(1).index] = "best"
    return marks


def _smoothed(rows: pd.DataFrame, weight: float) -> pd.DataFrame:
    """`value` from `raw`: an average of the past of the same phase, without bias to its start."""
    if weight <= 0 or rows.empty:
        return rows.assign(value=rows["raw"])
    curves = rows.groupby(["series", "phase", "split"], sort=False)["raw"]
    return rows.assign(value=curves.transform(lambda raw: raw.ewm(alpha=1 - weight).mean()))


def _thinned(rows: pd.DataFrame) -> pd.DataFrame:
    """Every n-th point of a curve that has more than can be seen; its marks and ends stay."""
    place = rows.groupby(["series", "phase", "split"], sort=False)
    count = place["x"].transform("size")
    if rows.empty or count.max() <= _MOST_POINTS:
        return rows
    position = place.cumcount()
    step = -(-count // _MOST_POINTS)
    ends = (position == 0) | (position == count - 1)
    return rows[(position % step == 0) | ends | (rows["mark"] != "")]


def boundaries(frame: pd.DataFrame, axis: Axis) -> pd.DataFrame:
    """The shaded regions: one row (start, end, text) per boundary, in the axis's own units."""
    unfrozen = frame[(frame["role"] == "run") & (frame["phase"] == "finetune")]
    rows = unfrozen.assign(start=unfrozen["boundary"], end=unfrozen["epoch"])
    if axis == "since":
        rows = rows.assign(start=0.0, end=unfrozen["since_unfreeze"])
    ends = rows.groupby("start", as_index=False)["end"].max()
    # A run that has only just been unfrozen still shows a region, one epoch wide.
    return ends.assign(end=ends["end"].clip(lower=ends["start"] + 1), text="unfrozen")


def inner_boundaries(frame: pd.DataFrame, axis: Axis) -> pd.DataFrame:
    """Where more layers were freed within a finetune phase: one row (start, text) for each place,
    in the axis's own units."""
    rows = frame[(frame["role"] == "run") & (frame["phase"] == "finetune")]
    trained = rows.groupby("run_id")["trainable_params"]
    # The line of an epoch says what trained in it: more was freed after the one before.
    freed = rows[trained.diff() > 0]
    places = freed[_AXIS_COLUMN[axis]].dropna() - 1
    return pd.DataFrame({"start": sorted(places.unique())}, dtype="float64").assign(
        text="more unfrozen"
    )
