"""Charts as files: SVG and PNG, drawn by vl-convert without a browser or a network.

A file has none of Streamlit's theme, so it gets a look of its own: dark text on white, which can be
put into any document. Text that belongs to no mark has the colour INK, so that a page which shows
the SVG on a ground of its own can give this text the page's colour by CSS.
"""

from __future__ import annotations

import re
from typing import Any, Final
from xml.etree import ElementTree

import altair as alt
from altair.typing import ChartType

INK: Final = "#2b3641"
_WIDTH: Final = 760
_PNG_SCALE: Final = 2.0  # sharp on paper and on dense screens
_LINE: Final = "#8a97a3"
_TEXT: Final = {"labelColor": INK, "titleColor": INK, "labelFontSize": 12, "titleFontSize": 12}
_LOOK: Final[dict[str, Any]] = {
    "background": "white",
    # vl-convert measures text in Liberation Sans, which is as wide as Arial.
    "font": "Arial, Liberation Sans, Helvetica, sans-serif",
    "axis": {
        **_TEXT,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "domainColor": _LINE,
        "tickColor": _LINE,
        "gridColor": _LINE,
        "gridOpacity": 0.3,
    },
    "legend": {**_TEXT, "titleFontWeight": "bold", "offset": 12, "rowPadding": 4},
    "header": _TEXT,
    "title": {"color": INK, "fontSize": 15, "fontWeight": "bold"},
    "text": {"color": INK},
    "view": {"stroke": None},
}
_SVG: Final = "http://www.w3.org/2000/svg"
_SHAPES: Final = frozenset(
    ("svg", "g", "defs", "clipPath", "linearGradient", "stop", "path", "rect", "line")
)
_DRAWN: Final = {f"{{{_SVG}}}{name}" for name in _SHAPES | {"text", "tspan"}}
_IDLE: Final = re.compile(r"aria-.*|role|class|pointer-events|display|cursor|.*href|on.*|style")
_NAMED: Final = re.compile(r"url\(#(.+)\)")
_LONG: Final = re.compile(r"(\.\d\d)\d+")
_NUMBERS: Final = frozenset(("d", "transform", "x", "y", "x1", "x2", "y1", "y2", "width", "height"))
# What XML cannot hold, and what changes the direction in which the text around it is written.
_UNFIT: Final = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
    "|[\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def to_svg(chart: ChartType, width: int = _WIDTH, alt_text: str = "", prefix: str = "") -> str:
    """The chart as a self-contained SVG document, `width` pixels wide with its axes and legends.

    It holds nothing but shapes and text, whatever is written in the data. `prefix` sets its ids
    apart from those of other charts on the same page.
    """
    import vl_convert as vlc

    drawn = ElementTree.fromstring(vlc.vegalite_to_svg(_spec(chart, width)))
    _reduce(drawn)
    _rename(drawn, prefix)
    drawn.set("role", "img")
    drawn.set("aria-label", printable(alt_text) or "Chart")
    ElementTree.register_namespace("", _SVG)
    return ElementTree.tostring(drawn, encoding="unicode")


def to_png(svg: str) -> bytes:
    """A drawing of `to_svg` as a PNG, at twice its size in pixels."""
    import vl_convert as vlc

    return bytes(vlc.svg_to_png(svg, scale=_PNG_SCALE))


def printable(text: str) -> str:
    """`text` with the characters that a document cannot hold written as their escapes."""
    return _UNFIT.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def _spec(chart: ChartType, width: int) -> dict[str, Any]:
    with alt.data_transformers.enable("default", max_rows=None):
        spec: dict[str, Any] = chart.to_dict()
    if "layer" in spec or "mark" in spec:
        # As Streamlit shows it: what surrounds the plot counts for its width and height too.
        spec |= {"width": width, "autosize": {"type": "fit", "contains": "padding"}}
    spec["config"] = spec.get("config", {}) | _LOOK
    return dict(_printable(spec))


def _printable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _printable(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_printable(each) for each in value]
    return printable(value) if isinstance(value, str) else value


# --- the drawing ------------------------------------------------------------------------------


def _reduce(element: ElementTree.Element) -> None:
    """Leave out what cannot be seen: half of a chart is there for a pointer or a screen reader of
    single marks."""
    for child in list(element):
        if child.tag not in _DRAWN or _invisible(child):
            element.remove(child)
            continue
        _reduce(child)
        if child.tag == f"{{{_SVG}}}g" and not len(child):
            element.remove(child)
    for name in [name for name in element.attrib if _IDLE.fullmatch(name)]:
        del element.attrib[name]
    for name in _NUMBERS & element.attrib.keys():
        element.set(name, _LONG.sub(r"\1", element.attrib[name]))


def _invisible(element: ElementTree.Element) -> bool:
    kind = element.get("class", "")
    empty = element.tag == f"{{{_SVG}}}path" and element.get("d") in ("", "M0,0h0v0h0Z")
    gone = element.get("opacity") == "0" or element.get("display") == "none"
    return gone or empty or kind.endswith("_voronoi")


def _rename(drawn: ElementTree.Element, prefix: str) -> None:
    """Number the ids anew: vl-convert goes on counting from chart to chart."""
    named = [each for each in drawn.iter() if "id" in each.attrib]
    names = {each.attrib["id"]: f"{prefix}{n}" for n, each in enumerate(named, start=1)}
    for element in drawn.iter():
        for attribute, value in element.attrib.items():
            if attribute == "id":
                element.set("id", names[value])
            elif match := _NAMED.fullmatch(value):
                element.set(attribute, f"url(#{names.get(match[1], 'none')})")
