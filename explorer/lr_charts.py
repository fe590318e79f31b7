"""What `python -m trainer lr-find` measured: its files, read and drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import altair as alt
import pandas as pd

from explorer.charts import DASHES, NOTE_COLOUR, RUN_COLOURS
from explorer.settings import rate_text
from trainer.files import read_bounded
from trainer.schema import LR_FIND

_NAMES: Final = {"steep": "steepest fall", "valley": "valley"}


@dataclass(frozen=True)
class RateTest:
    """One range test: columns rate, loss and smoothed, a row for each step. `suggested` rates by
    what they are: the steepest fall, the valley. `about` says in words what was tested."""

    name: str
    about: str
    frame: pd.DataFrame = field(repr=False)
    suggested: Mapping[str, float]
    diverged: bool


def rate_tests(runs_dir: Path) -> dict[str, RateTest]:
    """The tests of a runs folder by name, newest first; files that are none are left out."""
    folder = runs_dir / LR_FIND
    # As with runs, links are not followed: see explorer.data.
    inside = [] if folder.is_symlink() else folder.glob("*.json")
    files = sorted((path for path in inside if not path.is_symlink()), reverse=True)
    found = {path.stem: _read(path) for path in files}
    return {name: test for name, test in found.items() if test is not None}


def _read(path: Path) -> RateTest | None:
    try:
        content = json.loads(read_bounded(path).decode())
        columns = {name: _numbers(content[key]) for name, key in _COLUMNS.items()}
        suggested = {
            said: _numbers([content[key]])[0]
            for key, said in _NAMES.items()
            if content.get(key) is not None
        }
        frame = pd.DataFrame(columns, dtype="float64")
        good = len(frame) > 0 and frame["rate"].min() > 0 and min([1.0, *suggested.values()]) > 0
        about = _about(content)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ):
        return None
    diverged = content.get("diverged") is True
    return RateTest(path.stem, about, frame, suggested, diverged) if good else None


_COLUMNS: Final = {"rate": "rates", "loss": "losses", "smoothed": "smoothed"}


def _numbers(values: Any) -> list[float]:
    numbers = [float(value) for value in values]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("not a number")
    return numbers


def _about(content: Mapping[str, Any]) -> str:
    config, phase = content["config"], content["config"].get("phase")
    parent = content.get("parent_run_id")
    parts = [
        str(content["model"].get("arch")),
        f"{phase} with {config.get('unfreeze')} layers free" if phase == "finetune" else str(phase),
        str(config.get("optimizer")),
        f"batches of {config.get('batch_size')}",
        *([f"from run {parent}"] if parent else []),
    ]
    return ", ".join(parts)


def suggestion(test: RateTest) -> str:
    """What to make of it, in one sentence."""
    said = [f"{name} {rate_text(_short(rate))}" for name, rate in test.suggested.items()]
    if not said:
        return "The loss never fell: there is no rate to suggest."
    return f"Suggested: {', '.join(said)}."


def _short(rate: float) -> float:
    return float(f"{rate:.1e}")


def rate_curve(test: RateTest) -> alt.LayerChart:
    """The loss over the rate, smoothed and as measured, with a rule at each suggestion."""
    scale = alt.Scale(type="log", nice=False, padding=6)
    axis = alt.Axis(format="~e", tickCount=8, labelOverlap=True, grid=False)
    x = alt.X("rate:Q", title="Learning rate", scale=scale, axis=axis)
    low = test.frame["smoothed"].min()
    high = 1.5 * max(test.frame["smoothed"].iloc[0], low)
    # Where it diverges the loss would flatten everything that was before.
    y = alt.Scale(domain=[0.9 * low, max(high, 1e-6)], nice=False)
    base = alt.Chart(test.frame).encode(x)
    measured = base.mark_line(color=NOTE_COLOUR, strokeWidth=0.8, opacity=0.7, clip=True)
    smoothed = base.mark_line(color=RUN_COLOURS[0], strokeWidth=2.5, clip=True)
    tooltip = [
        alt.Tooltip("rate:Q", title="Learning rate", format=".1e"),
        alt.Tooltip("smoothed:Q", title="Loss, smoothed", format=".4f"),
        alt.Tooltip("loss:Q", title="Loss of the batch", format=".4f"),
    ]
    points = base.mark_point(size=60, opacity=0, clip=True)
    layers = [
        measured.encode(alt.Y("loss:Q", title="Loss", scale=y)),
        smoothed.encode(alt.Y("smoothed:Q", title="Loss", scale=y)),
        points.encode(alt.Y("smoothed:Q", title="Loss", scale=y), tooltip=tooltip),
        *_rules(test, scale),
    ]
    return alt.LayerChart(layer=layers).properties(height=300)


def _rules(test: RateTest, scale: alt.Scale) -> list[alt.Chart]:
    layers = []
    for place, (name, rate) in enumerate(test.suggested.items()):
        row = pd.DataFrame({"rate": [rate], "text": [f"{name} {rate_text(_short(rate))}"]})
        base = alt.Chart(row).encode(alt.X("rate:Q", scale=scale))
        colour = RUN_COLOURS[1 + place]
        layers.append(base.mark_rule(color=colour, strokeWidth=1.5, strokeDash=DASHES[place]))
        # One above the other: the two are often close together.
        text = base.mark_text(
            color=colour, align="right", baseline="top", dx=-6, dy=4 + 16 * place, fontSize=12
        )
        layers.append(text.encode(alt.YValue(0), alt.Text("text:N")))
    return layers
