"""Charts as files: SVG and PNG, drawn by vl-convert without a browser or a network."""

from __future__ import annotations

from altair.typing import ChartType

_PNG_SCALE = 2.0  # sharp on paper and on dense screens


def to_svg(chart: ChartType) -> str:
    """The chart as a self-contained SVG document."""
    import vl_convert as vlc

    return str(vlc.vegalite_to_svg(_spec(chart)))


def to_png(chart: ChartType) -> bytes:
    """The chart as a PNG, at twice its size in pixels."""
    import vl_convert as vlc

    return bytes(vlc.vegalite_to_png(_spec(chart), scale=_PNG_SCALE))


def _spec(chart: ChartType) -> str:
    return chart.to_json(indent=None)
