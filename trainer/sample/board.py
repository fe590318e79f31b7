"""Putting up the sign: worn by the weather, turned in space, on its pole."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from trainer.sample.faces import BLACK, STYLES, sign_face
from trainer.sample.textures import (
    Floats,
    Point,
    Rng,
    chance,
    noise,
    pick,
    shade,
    to_floats,
    to_image,
)


@dataclass(frozen=True)
class Pose:
    """Where the sign is: centre and radius in pixels of the photo, angles in radians."""

    x: float
    y: float
    radius: float
    yaw: float
    pitch: float
    roll: float

    def project(self, u: float, v: float) -> Point:
        """The pixel at which the point (u, v) of the sign's plane (radius 1) is seen."""
        x, y = u, v
        x, y = (
            x * math.cos(self.roll) - y * math.sin(self.roll),
            x * math.sin(self.roll) + y * math.cos(self.roll),
        )
        x, z = x * math.cos(self.yaw), x * math.sin(self.yaw)
        y, z = y * math.cos(self.pitch), z + y * math.sin(self.pitch)
        distance = 1 + 0.22 * z
        return self.x + self.radius * x / distance, self.y + self.radius * y / distance


def choose_pose(rng: Rng, width: int, height: int) -> Pose:
    short = min(width, height)
    radius = short * math.exp(rng.uniform(math.log(0.15), math.log(0.32)))
    # What evaluation's centre crop keeps of the photo, less the sign itself.
    reach = max(0.0, short * 0.43 - radius)
    return Pose(
        x=width / 2 + rng.uniform(-reach, reach),
        y=height / 2 + rng.uniform(-reach, reach * 0.7),
        radius=radius,
        yaw=float(np.clip(rng.normal(0, 0.45), -0.95, 0.95)),
        pitch=float(np.clip(rng.normal(0.1, 0.15), -0.4, 0.4)),
        roll=float(np.clip(rng.normal(0, 0.1), -0.35, 0.35)),
    )


def put_up(rng: Rng, photo: Image.Image, class_name: str, pose: Pose) -> Image.Image:
    """The photo with pole and sign; only the column they stand in is drawn, at twice the size."""
    reach = 1.35 * pose.radius
    box = (
        math.floor(pose.x - reach),
        math.floor(pose.y - reach),
        math.ceil(pose.x + reach),
        max(photo.height, math.ceil(pose.y + 2.3 * pose.radius)),
    )
    size = (2 * (box[2] - box[0]), 2 * (box[3] - box[1]))
    layer = Image.new("RGBA", size, (0, 0, 0, 0))
    if chance(rng, 0.85):
        _draw_pole(rng, ImageDraw.Draw(layer), pose, box)
    plate = _turned(_board(rng, class_name, pose), pose, box, size)
    # The edge of the metal sheet, seen at a slant, and its shade on the pole.
    edge = Image.new("RGBA", size, (70, 72, 74, 255))
    edge.putalpha(plate.getchannel("A"))
    slant = round(2.6 * math.sin(pose.yaw))
    layer.alpha_composite(edge, (max(0, slant), 1), (max(0, -slant), 0))
    layer.alpha_composite(plate)
    small = layer.reduce(2)
    scene = photo.copy()
    scene.paste(small, (box[0], box[1]), small)
    return scene


def _draw_pole(
    rng: Rng, draw: ImageDraw.ImageDraw, pose: Pose, box: tuple[int, int, int, int]
) -> None:
    width = 2 * pose.radius * rng.uniform(0.07, 0.16) * (2.2 if chance(rng, 0.15) else 1)
    tone = pick(rng, [(150, 152, 154), (110, 112, 116), (90, 84, 76), (60, 72, 66)])
    x = 2 * (pose.x - box[0])
    lean = math.tan(pose.roll) * 0.5
    top = 2 * (pose.y - box[1] - pose.radius * rng.uniform(0.7, 1.2))
    bottom = 2.0 * (box[3] - box[1])
    strips = 7
    for k in range(strips):  # a cylinder: bright left of its middle, dark towards its edges
        left, right = ((j / strips - 0.5) * width for j in (k, k + 1))
        bright = 1.15 - 1.1 * abs((k + 0.5) / strips - 0.38)
        shift = lean * (bottom - top)
        corners = [(x + left, top), (x + right, top)]
        corners += [(x + right - shift, bottom), (x + left - shift, bottom)]
        draw.polygon(corners, fill=shade(tone, bright))


def _board(rng: Rng, class_name: str, pose: Pose) -> Image.Image:
    """The weathered sign, with at times a plate below it: RGBA, 2 x 2 or 2 x 3 sign radii."""
    side = max(24, round(3.4 * pose.radius))
    face = sign_face(class_name, int(rng.integers(len(STYLES))))
    board = face.resize((side, side), Image.Resampling.LANCZOS)
    if chance(rng, 0.3):
        board = board.crop((0, 0, side, side * 3 // 2))
        _draw_plate(rng, ImageDraw.Draw(board), side)
    if chance(rng, 0.25):
        _draw_stickers(rng, ImageDraw.Draw(board), side)
    worn = _worn(rng, to_floats(board.convert("RGB")))
    painted = to_image(worn)
    painted.putalpha(board.getchannel("A"))
    return painted


def _draw_plate(rng: Rng, draw: ImageDraw.ImageDraw, side: int) -> None:
    left, right = side * rng.uniform(0.12, 0.24), side * rng.uniform(0.76, 0.88)
    top, bottom = side * 1.04, side * rng.uniform(1.24, 1.46)
    draw.rectangle((left, top, right, bottom), fill=(236, 236, 230), outline=BLACK)
    rows = int(rng.integers(1, 3))
    for row in range(rows):  # lines of text, too small to read
        y = top + (bottom - top) * (row + 0.5) / rows
        x = left + (right - left) * rng.uniform(0.1, 0.3)
        while x < right - (right - left) * 0.15:
            step = side * rng.uniform(0.03, 0.08)
            draw.rectangle((x, y - side * 0.03, x + step, y + side * 0.03), fill=BLACK)
            x += step + side * 0.025


def _draw_stickers(rng: Rng, draw: ImageDraw.ImageDraw, side: int) -> None:
    for _ in range(int(rng.integers(1, 4))):
        x, y = side * rng.uniform(0.25, 0.75, 2)
        w, h = side * rng.uniform(0.03, 0.09, 2)
        fill = pick(rng, [(240, 240, 240), (30, 30, 30), (220, 190, 40), (60, 140, 80)])
        if chance(rng, 0.5):
            draw.rectangle((x - w, y - h, x + w, y + h), fill=fill)
        else:
            draw.ellipse((x - w, y - w, x + w, y + w), fill=fill)


def _worn(rng: Rng, pixels: Floats) -> Floats:
    """Faded by the sun, dirty from the road, unevenly lit. `pixels` [height, width, 3] in 0..1."""
    height, width, _ = pixels.shape
    grey = pixels.mean(axis=2, keepdims=True)
    fade = rng.uniform(0, 0.65) ** 2
    pixels = pixels + fade * (0.35 * grey + 0.4 - pixels)
    dirt = np.maximum(0, noise(rng, width, height, width / 3) + rng.uniform(-0.5, 0.15))
    # Rain draws the dirt down, so the streaks vary across and hardly along the sign.
    streaks = np.maximum(0, noise(rng, width, 2, width / 14, 2)[:1] - 0.1)
    grime = np.clip(dirt * rng.uniform(0.2, 0.9) + streaks * rng.uniform(0, 0.6), 0, 0.7)[..., None]
    soil = np.array([0.34, 0.29, 0.22], dtype=np.float32)
    pixels = pixels + grime * (soil - pixels)
    across = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    down = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    slope = across * rng.uniform(-0.18, 0.18) + down * rng.uniform(-0.18, 0.18)
    lit = pixels * (rng.uniform(0.75, 1.1) + slope[..., None])
    if chance(rng, 0.15):  # the sun, mirrored in the foil
        spot = (across - rng.uniform(-0.8, 0.8)) ** 2 + (down - rng.uniform(-0.8, 0.8)) ** 2
        lit = lit + 0.5 * np.exp(-spot / rng.uniform(0.05, 0.3))[..., None]
    return lit.astype(np.float32, copy=False)


def _turned(
    board: Image.Image, pose: Pose, box: tuple[int, int, int, int], size: tuple[int, int]
) -> Image.Image:
    """The board as seen from the camera, in the layer's coordinates (twice the photo's)."""
    low = 2 * board.height / board.width - 1
    corners = [(-1.0, -1.0), (1.0, -1.0), (1.0, low), (-1.0, low)]
    target = [(2 * (x - box[0]), 2 * (y - box[1])) for x, y in (pose.project(*c) for c in corners)]
    source = [((u + 1) * board.width / 2, (v + 1) * board.width / 2) for u, v in corners]
    rows: list[list[float]] = []
    for (x, y), (u, v) in zip(target, source, strict=True):
        rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y])
        rows.append([0, 0, 0, x, y, 1, -v * x, -v * y])
    wanted = [c for point in source for c in point]
    coefficients = np.linalg.solve(np.array(rows), np.array(wanted)).tolist()
    return board.transform(
        size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR
    )
