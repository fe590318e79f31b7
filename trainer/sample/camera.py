"""What lies between the scene and the photo: leaves and wires, light and weather, the camera."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from trainer.sample.board import Pose
from trainer.sample.scenery import leaves
from trainer.sample.textures import Floats, Rng, chance, noise, pick, shade, to_floats, to_image


def foreground(rng: Rng, photo: Image.Image, pose: Pose) -> Image.Image:
    """At times something hides a part of the sign: leaves, a wire, a post. Never its most part."""
    kind = int(rng.integers(9))
    if kind > 3:
        return photo
    layer = Image.new("RGBA", photo.size, (60, 64, 50, 0))
    draw = ImageDraw.Draw(layer)
    angle = rng.uniform(0, 2 * math.pi)
    away = pose.radius * rng.uniform(0.8, 1.15)
    spot = (pose.x + away * math.cos(angle), pose.y + away * math.sin(angle))
    if kind < 2:
        reach = (pose.radius * rng.uniform(0.4, 0.9), pose.radius * rng.uniform(0.4, 0.9))
        leaves(draw, rng, spot, reach, max(1.5, pose.radius * 0.12), 45)
    elif kind == 2:
        x, wide = spot[0], pose.radius * rng.uniform(0.08, 0.22)
        tone = pick(rng, [(70, 72, 74), (120, 118, 112), (84, 66, 50)])
        draw.rectangle((x - wide, 0, x + wide, photo.height), fill=tone)
    else:
        slope = rng.uniform(-0.3, 0.3) * photo.width
        for _ in range(int(rng.integers(1, 4))):
            y = spot[1] + rng.normal(0, pose.radius * 0.4)
            draw.line((0, y - slope, photo.width, y + slope), fill=(40, 40, 42), width=1)
    layer = layer.filter(ImageFilter.BoxBlur(rng.uniform(0.2, 1.2)))
    scene = photo.copy()
    scene.paste(layer, (0, 0), layer)
    return scene


def light(rng: Rng, pixels: Floats, pose: Pose) -> Floats:
    """Time of day, weather and shadows on a photo [height, width, 3] in 0..1."""
    height, width, _ = pixels.shape
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    angle = rng.uniform(0, 2 * math.pi)
    slope = np.float32(math.cos(angle)) * x + np.float32(math.sin(angle)) * y
    gain = 1 + np.float32(rng.uniform(0, 0.25)) * slope
    if chance(rng, 0.35):  # the shadow of a tree or of a house
        patches = noise(rng, width // 4, height // 4, rng.uniform(7, 28), 2)
        dark = 1 / (1 + np.exp(-12 * (patches + np.float32(rng.uniform(-0.3, 0.3)))))
        dark = dark / (1 + np.exp(-20 * (np.linspace(-0.4, 0.6, height // 4)[:, None])))
        fine = Image.fromarray(dark.astype(np.float32)).resize(
            (width, height), Image.Resampling.BILINEAR
        )
        gain = gain * (1 - np.float32(rng.uniform(0.3, 0.55)) * np.asarray(fine))
    warm = rng.normal(0, 0.07)
    tint = np.array([1 + warm, 1 + rng.normal(0, 0.02), 1 - warm], dtype=np.float32)
    lit = pixels * gain[..., None].astype(np.float32)
    lit *= tint
    weather = rng.random()
    if weather < 0.12:
        return _night(rng, lit, pose)
    if weather < 0.27:  # fog, or the sun on a dusty windscreen
        veil = np.array([0.76, 0.78, 0.8], dtype=np.float32) * np.float32(rng.uniform(0.8, 1.2))
        fog = np.float32(rng.uniform(0.2, 0.5))
        lit *= 1 - fog
        lit += fog * veil
    return lit


def _night(rng: Rng, pixels: Floats, pose: Pose) -> Floats:
    """Dark and blue, the sign in the headlights, street lamps as discs out of focus."""
    height, width, _ = pixels.shape
    x = np.arange(width, dtype=np.float32)[None, :]
    y = np.arange(height, dtype=np.float32)[:, None]
    far = ((x - pose.x) ** 2 + (y - pose.y) ** 2) / (pose.radius * rng.uniform(1.5, 4)) ** 2
    beam = rng.uniform(0.25, 0.75) * np.exp(-far)
    dark = pixels * (rng.uniform(0.14, 0.28) + beam[..., None])
    dark = dark * np.array([0.92, 0.96, 1.12], dtype=np.float32)
    lamps = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(lamps)
    for _ in range(int(rng.integers(2, 12))):
        cx, cy = width * rng.uniform(0, 1), height * rng.uniform(0.3, 0.8)
        r = rng.uniform(1.5, 7)
        hue = pick(rng, [(255, 214, 140), (255, 240, 210), (255, 60, 40), (120, 230, 150)])
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=shade(hue, rng.uniform(0.3, 0.8)))
    glow = to_floats(lamps.filter(ImageFilter.BoxBlur(1.0)))
    distance = np.hypot(x - pose.x, y - pose.y)[..., None]
    glow = glow * (distance > 1.1 * pose.radius)  # the lamps are behind the sign
    lit: Floats = (dark + glow).astype(np.float32)
    return lit


def take_photo(rng: Rng, pixels: Floats) -> Image.Image:
    """Lens, shutter, sensor and file format of a cheap dash camera or phone."""
    height, width, _ = pixels.shape
    if chance(rng, 0.35):
        pixels = _shaken(pixels, rng.uniform(2, 7), rng.uniform(0, math.pi))
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :, None]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None, None]
    vignette = 1 - np.float32(rng.uniform(0, 0.18)) * (x * x + y * y)
    contrast, exposure = rng.uniform(0.8, 1.2), math.exp(rng.normal(0.06, 0.15))
    # Steps work in place: fresh memory for every intermediate would cost more than the sums.
    exposed = pixels * (vignette * np.float32(exposure * contrast))
    exposed += np.float32(0.45 * (1 - contrast))
    photo = to_image(exposed)
    if chance(rng, 0.5):
        photo = photo.filter(ImageFilter.BoxBlur(rng.uniform(0.3, 1.1)))
    exposed = to_floats(photo)
    # Uniform, scaled to deviation 1: it looks like normal noise, which costs 3 times more.
    grain = rng.random((height, width, 3), dtype=np.float32)
    grain -= np.float32(0.5)
    grain *= np.float32(3.46 * (0.008 + 0.05 * rng.random() ** 3))
    # Photons come at random: bright pixels are noisier in absolute terms, dark ones in relative.
    grain *= np.sqrt(exposed) + np.float32(0.5)
    exposed += grain
    buffer = io.BytesIO()
    to_image(exposed).save(buffer, "JPEG", quality=int(rng.integers(30, 85)))
    return Image.open(buffer).convert("RGB")


def _shaken(pixels: Floats, length: float, angle: float) -> Floats:
    """Motion blur: the mean of the photo at places along a line of `length` pixels."""
    steps = max(2, math.ceil(length))
    reach = math.ceil(length / 2) + 1
    height, width, _ = pixels.shape
    padded = np.pad(pixels, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    total = np.zeros_like(pixels)
    for k in range(steps):
        away = (k / (steps - 1) - 0.5) * length
        dx, dy = reach + round(away * math.cos(angle)), reach + round(away * math.sin(angle))
        total += padded[dy : dy + height, dx : dx + width]
    return total / np.float32(steps)
