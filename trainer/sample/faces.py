"""The sign faces, as they leave the factory: flat, clean, in one of a few countries' styles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from trainer.sample.textures import Colour, Point


@dataclass(frozen=True)
class _Style:
    """How one country's road authority paints its signs; sizes in units of the sign's radius."""

    red: Colour = (196, 24, 32)
    blue: Colour = (18, 84, 168)
    white: Colour = (244, 244, 240)
    yellow: Colour = (246, 190, 20)
    ground: Colour = (244, 244, 240)
    ring: float = 0.2
    bold: float = 0.03


BLACK: Final[Colour] = (22, 22, 24)
STYLES: Final = (
    _Style(),
    _Style(red=(214, 40, 36), blue=(0, 98, 176), ring=0.16, bold=0.04),
    _Style(red=(178, 16, 40), blue=(24, 62, 140), ring=0.24, bold=0.02),
    _Style(red=(206, 52, 30), yellow=(250, 204, 60), ground=(248, 214, 96), ring=0.18),
)
_FACE: Final = 256


@dataclass(frozen=True)
class _Pen:
    """Draws in a square of -1 to 1, y down; the image is drawn large and then reduced."""

    draw: ImageDraw.ImageDraw
    centre: float
    unit: float

    def at(self, points: Iterable[Point]) -> list[Point]:
        return [(self.centre + x * self.unit, self.centre + y * self.unit) for x, y in points]

    def disc(self, x: float, y: float, radius: float, fill: Colour) -> None:
        box = self.at([(x - radius, y - radius), (x + radius, y + radius)])
        self.draw.ellipse(box, fill=fill)

    def line(self, points: Sequence[Point], width: float, fill: Colour) -> None:
        self.draw.line(self.at(points), fill=fill, width=round(width * self.unit), joint="curve")

    def polygon(self, points: Sequence[Point], fill: Colour, corner: float = 0.0) -> None:
        """A polygon grown by `corner` on all sides, its corners rounded by that radius."""
        self.draw.polygon(self.at(points), fill=fill)
        if corner > 0:
            self.line([*points, points[0]], 2 * corner, fill)
            for x, y in points:
                self.disc(x, y, corner, fill)

    def text(self, text: str, width: float, fill: Colour, bold: float) -> None:
        probe = ImageFont.load_default(size=100)
        left, _, right, _ = self.draw.textbbox((0, 0), text, font=probe)
        font = ImageFont.load_default(size=round(100 * width * self.unit / (right - left)))
        stroke = round(bold * self.unit)
        (spot,) = self.at([(0, 0)])
        self.draw.text(spot, text, fill=fill, font=font, anchor="mm", stroke_width=stroke)


def regular(corners: int, radius: float, turn: float) -> list[Point]:
    angles = [2 * math.pi * (k + turn) / corners for k in range(corners)]
    return [(radius * math.sin(a), -radius * math.cos(a)) for a in angles]


def _ringed(pen: _Pen, style: _Style, ring: Colour, inside: Colour) -> None:
    pen.disc(0, 0, 1.0, style.white)
    pen.disc(0, 0, 0.97, ring)
    pen.disc(0, 0, 0.97 - style.ring, inside)


def _draw_ahead_only(pen: _Pen, style: _Style) -> None:
    _ringed(pen, style, style.blue, style.blue)
    pen.line([(0, 0.72), (0, -0.1)], 0.26, style.white)
    pen.polygon([(0, -0.76), (-0.46, -0.08), (0.46, -0.08)], style.white)


def _draw_no_entry(pen: _Pen, style: _Style) -> None:
    _ringed(pen, style, style.red, style.red)
    pen.polygon([(-0.7, -0.17), (0.7, -0.17), (0.7, 0.17), (-0.7, 0.17)], style.white)


def _draw_no_parking(pen: _Pen, style: _Style) -> None:
    _ringed(pen, style, style.red, style.blue)
    pen.line([(-0.58, -0.58), (0.58, 0.58)], style.ring * 0.95, style.red)


def _draw_triangle(pen: _Pen, style: _Style, turn: float) -> None:
    y = 0.1 if turn == 0 else -0.1
    for radius, fill in ((1.0, style.white), (0.95, style.red), (0.95 - 2.1 * style.ring, None)):
        points = [(x, y + v) for x, v in regular(3, radius, turn)]
        pen.polygon(points, style.ground if fill is None else fill, 0.06)


def _draw_yield(pen: _Pen, style: _Style) -> None:
    _draw_triangle(pen, style, 0.5)


def _draw_pedestrians(pen: _Pen, style: _Style) -> None:
    _draw_triangle(pen, style, 0)
    pen.disc(0.0, -0.27, 0.075, BLACK)
    pen.polygon([(-0.06, -0.15), (0.07, -0.15), (0.06, 0.15), (-0.07, 0.15)], BLACK, 0.02)
    pen.line([(-0.01, 0.13), (-0.09, 0.3), (-0.2, 0.45)], 0.09, BLACK)
    pen.line([(0.01, 0.13), (0.12, 0.28), (0.16, 0.46)], 0.09, BLACK)
    pen.line([(0.03, -0.13), (0.15, 0.02), (0.25, 0.05)], 0.06, BLACK)
    pen.line([(-0.03, -0.13), (-0.13, 0.0), (-0.14, 0.1)], 0.06, BLACK)


def _draw_priority_road(pen: _Pen, style: _Style) -> None:
    pen.polygon(regular(4, 0.92, 0), BLACK, 0.07)
    pen.polygon(regular(4, 0.9, 0), style.white, 0.07)
    pen.polygon(regular(4, 0.62, 0), style.yellow, 0.04)


def _draw_road_works(pen: _Pen, style: _Style) -> None:
    _draw_triangle(pen, style, 0)
    pen.disc(0.02, -0.24, 0.075, BLACK)
    pen.polygon([(-0.16, 0.12), (-0.08, -0.14), (0.04, -0.14), (0.0, 0.12)], BLACK, 0.02)
    pen.line([(-0.06, 0.1), (0.0, 0.26), (-0.04, 0.46)], 0.09, BLACK)
    pen.line([(-0.12, 0.1), (-0.2, 0.28), (-0.32, 0.46)], 0.09, BLACK)
    pen.line([(0.0, -0.1), (0.1, 0.06), (0.2, 0.12)], 0.06, BLACK)
    pen.line([(-0.06, -0.02), (0.34, 0.24)], 0.04, BLACK)
    pen.polygon([(0.12, 0.48), (0.28, 0.24), (0.44, 0.48)], BLACK, 0.01)


def _draw_roundabout(pen: _Pen, style: _Style) -> None:
    _ringed(pen, style, style.blue, style.blue)
    for third in range(3):
        start = 2 * math.pi * third / 3
        angles = [start - 1.35 * step / 11 for step in range(12)]
        pen.line([(0.5 * math.cos(a), 0.5 * math.sin(a)) for a in angles], 0.16, style.white)
        tip, base = start - 1.85, start - 1.3
        head = [(0.5, tip), (0.72, base), (0.28, base)]
        pen.polygon([(r * math.cos(a), r * math.sin(a)) for r, a in head], style.white)


def _draw_speed(pen: _Pen, style: _Style, limit: str) -> None:
    _ringed(pen, style, style.red, style.white)
    pen.text(limit, 1.2, BLACK, style.bold)


def _draw_stop(pen: _Pen, style: _Style) -> None:
    pen.polygon(regular(8, 1.0, 0.5), style.white)
    pen.polygon(regular(8, 0.93, 0.5), style.red)
    pen.text("STOP", 1.45, style.white, style.bold)


def _draw_turn_right(pen: _Pen, style: _Style) -> None:
    _ringed(pen, style, style.blue, style.blue)
    pen.line([(-0.26, 0.68), (-0.26, -0.12), (0.2, -0.12)], 0.26, style.white)
    pen.disc(-0.26, -0.12, 0.13, style.white)
    pen.polygon([(0.74, -0.12), (0.14, -0.54), (0.14, 0.3)], style.white)


_DRAW: Final[dict[str, Callable[[_Pen, _Style], None]]] = {
    "ahead_only": _draw_ahead_only,
    "no_entry": _draw_no_entry,
    "no_parking": _draw_no_parking,
    "pedestrians": _draw_pedestrians,
    "priority_road": _draw_priority_road,
    "road_works": _draw_road_works,
    "roundabout": _draw_roundabout,
    "speed_30": lambda pen, style: _draw_speed(pen, style, "30"),
    "speed_50": lambda pen, style: _draw_speed(pen, style, "50"),
    "stop": _draw_stop,
    "turn_right": _draw_turn_right,
    "yield": _draw_yield,
}


@cache  # 12 classes x 4 styles of 256 KB
def sign_face(class_name: str, style: int) -> Image.Image:
    """The sign as it left the factory: RGBA, `_FACE` pixels a side, seen straight."""
    large = Image.new("RGBA", (2 * _FACE, 2 * _FACE), (0, 0, 0, 0))
    pen = _Pen(ImageDraw.Draw(large), centre=_FACE, unit=_FACE * 0.97)
    _DRAW[class_name](pen, STYLES[style])
    return large.reduce(2)
