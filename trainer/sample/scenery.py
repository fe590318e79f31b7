"""What stands in a backdrop: ground, road, trees, houses, cars, things that look like signs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image, ImageDraw

from trainer.sample.faces import regular
from trainer.sample.textures import Colour, Point, Rng, chance, pick, shade

WALLS: Final = (
    (196, 180, 152),
    (168, 120, 96),
    (206, 200, 190),
    (150, 146, 140),
    (186, 152, 110),
    (122, 96, 84),
    (176, 188, 190),
    (214, 188, 140),
)
GREENS: Final = ((58, 88, 40), (82, 108, 48), (44, 72, 44), (104, 116, 58), (122, 96, 44))
PAINTS: Final = (
    (178, 28, 30),
    (28, 72, 150),
    (236, 236, 232),
    (40, 42, 46),
    (130, 134, 138),
    (232, 182, 32),
    (46, 112, 74),
    (198, 96, 40),
)


@dataclass(frozen=True)
class Stage:
    """A backdrop in the making, drawn at twice the photo's size so that edges come out smooth."""

    rng: Rng
    image: Image.Image
    draw: ImageDraw.ImageDraw
    width: int
    height: int
    horizon: int


def ground(stage: Stage, palette: Sequence[Colour]) -> None:
    near = pick(stage.rng, palette)
    haze = shade(near, 0.8, (40, 42, 46))
    bands = 14
    depth = stage.height - stage.horizon
    for k in range(bands):  # paler towards the horizon
        part = k / (bands - 1)
        fill = tuple(round(h + (n - h) * part) for n, h in zip(near, haze, strict=True))
        top = stage.horizon + depth * (k / bands) ** 1.6
        stage.draw.rectangle((0, top, stage.width, stage.height), fill=fill)


def road(stage: Stage) -> None:
    rng, draw = stage.rng, stage.draw
    vanish = stage.width * rng.uniform(0.2, 0.8)
    left, right = stage.width * rng.uniform(-0.6, 0.25), stage.width * rng.uniform(0.75, 1.6)
    tarmac = pick(rng, [(96, 96, 98), (78, 78, 82), (120, 116, 112)])
    kerb = pick(rng, [(160, 156, 148), (112, 104, 84), (190, 188, 182)])
    for grow, fill in ((0.06, kerb), (0.0, tarmac)):
        wide = stage.width * grow
        corners = [(vanish - 2, stage.horizon), (vanish + 2, stage.horizon)]
        corners += [(right + wide, stage.height), (left - wide, stage.height)]
        draw.polygon(corners, fill=fill)
    middle = (left + right) / 2
    white = shade((214, 212, 200), rng.uniform(0.8, 1))
    for k in range(1, 7):  # dashes shrink towards the vanishing point
        near, far = 1.5 ** (1 - k), 1.5 ** (1 - k) * 0.8
        points = []
        for t, side in ((near, -1), (near, 1), (far, 1), (far, -1)):
            x = vanish + (middle - vanish) * t + side * t * stage.width * 0.012
            points.append((x, stage.horizon + (stage.height - stage.horizon) * t))
        draw.polygon(points, fill=white)


def tree(stage: Stage, x: float, foot: float, size: float) -> None:
    rng, draw = stage.rng, stage.draw
    trunk = size * 0.06
    draw.rectangle((x - trunk, foot - size, x + trunk, foot), fill=pick(rng, [(72, 58, 44)]))
    leaves(draw, rng, (x, foot - size * 1.1), (size * 0.55, size * 0.7), size * 0.1, 110)


def leaves(
    draw: ImageDraw.ImageDraw,
    rng: Rng,
    centre: Point,
    reach: Point,
    size: float,
    count: int,
    greens: Sequence[Colour] = GREENS,
) -> None:
    """A clump of leaves: dark ones first, lit ones on top and towards the upper left."""
    lit = np.linspace(0, 1, count)[:, None]
    places = np.clip(rng.normal(0, 0.45, (count, 2)), -1, 1) - lit * [0.12, 0.25]
    middles = np.array(centre) + places * reach
    radii = size * rng.uniform(0.5, 1.3, (count, 2))
    boxes = np.hstack([middles - radii, middles + radii]).tolist()
    tones = np.array(pick(rng, greens)) * (0.5 + 0.75 * lit + rng.normal(0, 0.1, (count, 1)))
    for box, (r, g, b) in zip(boxes, tones.clip(0, 255).astype(int).tolist(), strict=True):
        draw.ellipse(box, fill=(r, g, b))


def fence(stage: Stage) -> None:
    tone = pick(stage.rng, [(120, 104, 84), (196, 196, 192), (130, 134, 138)])
    top, height = stage.horizon + stage.height * 0.04, stage.height * stage.rng.uniform(0.05, 0.12)
    gap = stage.width * stage.rng.uniform(0.04, 0.12)
    for k in range(int(stage.width / gap) + 2):
        stage.draw.rectangle((k * gap, top, k * gap + gap * 0.1, top + height), fill=tone)
    for part in (0.25, 0.65):
        y = top + height * part
        stage.draw.rectangle((0, y, stage.width, y + height * 0.12), fill=shade(tone, 0.9))


def facade(stage: Stage, quad: Sequence[Point], columns: int, rows: int) -> None:
    """A house front in the quadrilateral (from the upper left, clockwise), with its windows."""
    rng = stage.rng
    wall = pick(rng, WALLS)
    stage.draw.polygon(list(quad), fill=wall)
    glass = pick(rng, [(52, 62, 76), (90, 110, 130), (40, 40, 44), (150, 168, 182)])
    frame = shade(wall, 0.8 if chance(rng, 0.5) else 1.2)
    wide, high = rng.uniform(0.2, 0.38), rng.uniform(0.25, 0.4)
    for row in range(rows):
        for column in range(columns):
            u, v = (column + 0.5) / columns, (row + 0.5) / rows
            pane = shade(glass, rng.uniform(0.7, 1.2))
            if chance(rng, 0.06):
                pane = (236, 206, 140)  # somebody is at home
            for grow, fill in ((1.25, frame), (1.0, pane)):
                du, dv = wide / columns * grow, high / rows * grow
                spots = [(u - du, v - dv), (u + du, v - dv), (u + du, v + dv), (u - du, v + dv)]
                stage.draw.polygon([_inside(quad, *spot) for spot in spots], fill=fill)
    if chance(rng, 0.35):  # an awning or a shop's name over the ground floor
        spots = [(0.06, 0.8), (0.94, 0.8), (0.94, 0.87), (0.06, 0.87)]
        stage.draw.polygon([_inside(quad, *s) for s in spots], fill=pick(rng, PAINTS))


def _inside(quad: Sequence[Point], u: float, v: float) -> Point:
    (ax, ay), (bx, by), (cx, cy), (dx, dy) = quad
    x = (ax + (bx - ax) * u) * (1 - v) + (dx + (cx - dx) * u) * v
    y = (ay + (by - ay) * u) * (1 - v) + (dy + (cy - dy) * u) * v
    return x, y


def car(stage: Stage) -> None:
    rng, draw = stage.rng, stage.draw
    depth = rng.uniform(0.25, 1)
    length, x = stage.width * 0.3 * depth, stage.width * rng.uniform(-0.1, 0.95)
    foot = stage.horizon + (stage.height - stage.horizon) * (
        0.12 + 0.5 * depth * rng.uniform(0.4, 1)
    )
    high = length * 0.2
    paint = pick(rng, PAINTS)
    draw.ellipse((x, foot - high * 0.2, x + length, foot + high * 0.25), fill=(44, 44, 46))
    roof = [(0.18, -1.0), (0.3, -1.75), (0.68, -1.75), (0.86, -1.0)]
    draw.polygon([(x + length * u, foot + high * v) for u, v in roof], fill=shade(paint, 0.8))
    glass = [(0.23, -1.02), (0.32, -1.6), (0.66, -1.6), (0.79, -1.02)]
    draw.polygon([(x + length * u, foot + high * v) for u, v in glass], fill=(58, 68, 80))
    body = (x, foot - high * 1.1, x + length, foot - high * 0.2)
    draw.rounded_rectangle(body, high * 0.35, fill=paint)
    for u in (0.2, 0.8):
        for size, fill in ((0.42, (28, 28, 30)), (0.2, (150, 150, 152))):
            wx, wy, r = x + length * u, foot - high * 0.2, high * size
            draw.ellipse((wx - r, wy - r, wx + r, wy + r), fill=fill)


def distractor(stage: Stage) -> None:
    """Something that has a sign's colours but is none: boards, lamps, backs of other signs."""
    rng, draw = stage.rng, stage.draw
    x, y = stage.width * rng.uniform(0, 1), stage.horizon - stage.height * rng.uniform(-0.1, 0.4)
    size = stage.height * rng.uniform(0.03, 0.1)
    paint = pick(rng, PAINTS)
    kind = int(rng.integers(4))
    if kind > 0:
        draw.rectangle((x - 2, y, x + 2, max(y + size, stage.horizon + size)), fill=(96, 98, 100))
    if kind == 0:  # lights and balloons
        draw.ellipse((x - size / 2, y - size / 2, x + size / 2, y + size / 2), fill=paint)
    elif kind == 1:  # a round or three-cornered sign from behind
        points = [(x + size * u, y + size * v) for u, v in regular(3, 1, 0)]
        grey = pick(rng, [(128, 130, 132), (158, 160, 160)])
        if chance(rng, 0.5):
            draw.polygon(points, fill=grey)
        else:
            draw.ellipse((x - size, y - size, x + size, y + size), fill=grey)
    elif kind == 2:  # a traffic light
        draw.rectangle((x - size * 0.4, y - size, x + size * 0.4, y + size), fill=(34, 36, 38))
        on = int(rng.integers(3))
        for k, lamp in enumerate(((228, 44, 36), (240, 176, 40), (60, 200, 110))):
            reach, middle = size * 0.25, y + (k - 1) * size * 0.62
            box = (x - reach, middle - reach, x + reach, middle + reach)
            draw.ellipse(box, fill=lamp if k == on else (60, 58, 56))
    else:  # a direction board or an advertisement
        wide = size * rng.uniform(1, 2.2)
        draw.rectangle(
            (x - wide, y - size, x + wide, y + size), fill=paint, outline=(220, 220, 216)
        )
        ink = (236, 236, 232) if sum(paint) < 420 else (40, 40, 44)
        for line in (-0.5, 0.1, 0.6):
            end = x + wide * rng.uniform(-0.3, 0.8)
            draw.rectangle(
                (x - wide * 0.8, y + size * line, end, y + size * (line + 0.2)), fill=ink
            )
