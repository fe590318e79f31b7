"""What is behind the sign: a street, the country, a wall or a hedge, drawn without the class."""

from __future__ import annotations

from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from trainer.sample.scenery import (
    GREENS,
    PAINTS,
    WALLS,
    Stage,
    car,
    distractor,
    facade,
    fence,
    ground,
    leaves,
    road,
    tree,
)
from trainer.sample.textures import Rng, chance, noise, pick, shade, to_floats, to_image

_SKIES: Final = (
    ((92, 144, 208), (204, 222, 238)),
    ((150, 170, 192), (214, 218, 220)),
    ((178, 182, 186), (222, 222, 220)),
    ((120, 132, 168), (244, 204, 164)),
    ((64, 110, 178), (168, 202, 232)),
)


def backdrop(rng: Rng, width: int, height: int) -> Image.Image:
    """What is behind the sign, slightly out of focus: RGB, width x height."""
    horizon = rng.uniform(0.45, 0.72)
    image = _sky(rng, width, height, horizon)
    stage = Stage(
        rng, image, ImageDraw.Draw(image), 2 * width, 2 * height, round(2 * height * horizon)
    )
    scenes = (_country, _country, _street, _street, _street, _wall, _hedge)
    scenes[int(rng.integers(len(scenes)))](stage)
    for _ in range(int(rng.integers(0, 4))):
        distractor(stage)
    pixels = to_floats(image.reduce(2))
    rows = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    rough = 0.05 + 0.12 / (1 + np.exp(-(rows - horizon) * 30))  # the sky is smooth, tarmac is not
    grain = rng.random((height, width), dtype=np.float32) - np.float32(0.5)
    texture = 1 + rough * (noise(rng, width, height, 12, 2) * 0.7 + grain * 1.4)
    pixels *= texture[..., None].astype(np.float32)
    photo = to_image(pixels)
    return photo.filter(ImageFilter.BoxBlur(rng.uniform(0.2, 1.8)))


def _sky(rng: Rng, width: int, height: int, horizon: float) -> Image.Image:
    """A gradient with clouds, twice the photo's size; it is smooth, so a quarter is computed."""
    coarse = (width // 2, height // 2)
    top, low = (np.array(c, np.float32) / 255 for c in _SKIES[int(rng.integers(len(_SKIES)))])
    rows = np.linspace(0, 1 / horizon, coarse[1], dtype=np.float32).clip(0, 1)[:, None, None]
    sky = top + (low - top) * rows
    # Drawn tall and squeezed, because clouds are seen from the side: wide and flat.
    clouds = noise(rng, coarse[0], coarse[1] * 2, coarse[0] / 3, 5)[::2]
    cover = np.clip(0.45 + clouds * 0.8 + rng.uniform(-0.5, 0.3), 0, 1) ** 2
    cover = cover[..., None] * np.float32(rng.uniform(0.3, 0.9))
    cloudy = to_image(sky + cover * (np.float32(0.93) - sky))
    return cloudy.resize((2 * width, 2 * height), Image.Resampling.BILINEAR)


def _country(stage: Stage) -> None:
    rng = stage.rng
    for far in (1.0, 0.6):
        ridge = noise(rng, stage.width // 8 + 1, 2, 24, 3)[0] * stage.height * 0.07 * far
        base = stage.horizon - stage.height * 0.06 * far
        outline = [(8.0 * k, base + float(r)) for k, r in enumerate(ridge)]
        fill = shade(pick(rng, GREENS), 0.9, (70 * far, 80 * far, 100 * far))
        corners = [(stage.width + 8, stage.height), (0, stage.height)]
        stage.draw.polygon([*outline, *corners], fill=fill)
    ground(stage, [(104, 122, 60), (86, 110, 52), (150, 136, 80), (196, 196, 194)])
    if chance(rng, 0.8):
        road(stage)
    for _ in range(int(rng.integers(2, 7))):
        depth = rng.uniform(0.25, 1)
        x, size = stage.width * rng.uniform(-0.05, 1.05), stage.height * 0.3 * depth
        tree(stage, x, stage.horizon + stage.height * 0.12 * depth, size)
    if chance(rng, 0.3):
        fence(stage)


def _street(stage: Stage) -> None:
    rng = stage.rng
    x = -stage.width * rng.uniform(0, 0.2)
    while x < stage.width:  # the far side, seen straight
        wide = stage.width * rng.uniform(0.12, 0.35)
        top = stage.horizon - stage.height * rng.uniform(0.1, 0.5)
        foot = stage.horizon + 4.0
        quad = [(x, top), (x + wide, top), (x + wide, foot), (x, foot)]
        facade(stage, quad, int(rng.integers(2, 6)), int(rng.integers(2, 6)))
        x += wide * rng.uniform(1.0, 1.15)
    ground(stage, [(128, 126, 122), (108, 108, 110), (146, 138, 128)])
    road(stage)
    for side in (0, 1):  # near houses, their lines running to the vanishing point
        if chance(rng, 0.55):
            edge = stage.width * side
            inner = edge + (1 - 2 * side) * stage.width * rng.uniform(0.15, 0.4)
            low = stage.height * rng.uniform(0.8, 1.1)
            top = stage.horizon - stage.height * rng.uniform(0.2, 0.45)
            quad = [(edge, top - stage.height * 0.35), (inner, top)]
            quad += [(inner, stage.horizon + stage.height * 0.04), (edge, low)]
            facade(stage, quad, int(rng.integers(2, 5)), int(rng.integers(3, 6)))
    for _ in range(int(rng.integers(0, 3))):
        foot = stage.horizon + stage.height * rng.uniform(0.03, 0.14)
        tree(stage, stage.width * rng.uniform(0, 1), foot, stage.height * rng.uniform(0.15, 0.3))
    for _ in range(int(rng.integers(0, 4))):
        car(stage)


def _wall(stage: Stage) -> None:
    """A brick wall, rendered or bare, close behind the sign."""
    rng, draw = stage.rng, stage.draw
    base = pick(rng, [(150, 84, 62), (168, 112, 84), (186, 172, 150), (124, 110, 104)])
    foot = stage.height * rng.uniform(0.75, 1.2)
    draw.rectangle((0, 0, stage.width, foot), fill=shade(base, 0.8, (24, 26, 28)))
    high = stage.height * rng.uniform(0.03, 0.07)
    wide = high * rng.uniform(2, 3)
    tones = rng.normal(1, 0.13, (int(foot / high) + 1, int(stage.width / wide) + 2))
    for row, line in enumerate(tones):
        for column, tone in enumerate(line):
            x, y = (column - 0.5 * (row % 2)) * wide, row * high
            box = (x + 1, y + 1, x + wide - 2, min(y + high - 2, foot))
            if box[3] > box[1]:
                draw.rectangle(box, fill=shade(base, float(tone)))
    if foot < stage.height:
        draw.rectangle((0, foot, stage.width, stage.height), fill=pick(rng, [(132, 130, 126)]))
    for _ in range(int(rng.integers(0, 3))):  # windows, doors, posters
        x, y = stage.width * rng.uniform(-0.1, 0.9), stage.height * rng.uniform(-0.1, 0.6)
        w, h = stage.width * rng.uniform(0.1, 0.3), stage.height * rng.uniform(0.15, 0.4)
        draw.rectangle((x, y, x + w, y + h), fill=pick(rng, WALLS))
        inside = (x + w * 0.07, y + h * 0.05, x + w * 0.93, y + h * 0.95)
        draw.rectangle(inside, fill=pick(rng, [*PAINTS, (60, 70, 84), (100, 116, 130)]))


def _hedge(stage: Stage) -> None:
    rng = stage.rng
    ground(stage, [(104, 122, 60), (128, 126, 122)])
    stage.draw.rectangle((0, stage.height * 0.15, stage.width, stage.horizon), fill=(40, 54, 32))
    greens = [pick(rng, GREENS)]
    for y in np.linspace(0.2, 0.95, 14).tolist():  # from the far bushes to the near ones
        spot = (stage.width * rng.uniform(-0.1, 1.1), stage.horizon * y)
        reach = stage.height * rng.uniform(0.15, 0.28)
        size = stage.height * 0.016
        leaves(stage.draw, rng, spot, (reach * 1.5, reach), size, 110, greens)
