"""Keras 3 on TensorFlow: keras.applications, model.fit and a tf.data pipeline with a cache.

The network gets torchvision's weights. Keras pads strided convolutions on two sides only, divides
by another epsilon in BatchNorm and leaves normalisation to `preprocess_input`; with these three set
as torchvision has them it computes the same logits, so that accuracies can be compared.

TensorFlow and torch each bring their own LLVM and may not share a process: torch converts the file
in another one, once, beside the split (the benchmark's trial run does it, outside what is timed).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Final, Literal

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from tests.benchmarks.peers.job import (
    BATCH,
    BRIGHTNESS,
    CONTRAST,
    CROP,
    CROP_FROM,
    MEAN,
    NOISE,
    RESIZE,
    STD,
    TURN,
    Job,
    Phase,
    PhaseClock,
    Report,
)

_EPSILON: Final = 1e-5
_CONVERT: Final = """
import sys, numpy, torch
tensors = torch.load(sys.argv[1], weights_only=True)
numpy.savez(sys.argv[2], **{name: tensor.numpy() for name, tensor in tensors.items()})
"""


class _Timed(keras.callbacks.Callback):
    """Validation runs inside Keras' epoch, so its start ends the clock's epoch."""

    def __init__(self, clock: PhaseClock) -> None:
        super().__init__()
        self.clock = clock
        self.fitting = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.fitting = True
        self.clock.start_epoch()

    def on_test_begin(self, logs: Any = None) -> None:
        if self.fitting:
            self.clock.end_epoch()

    def on_test_end(self, logs: Any = None) -> None:
        self.clock.validated(logs["accuracy"])


def run(job: Job, report: Report) -> None:
    keras.utils.set_random_seed(job.seed)
    base, model = _network(job)
    train, val = _batches(job, "train"), _batches(job, "val")
    for phase in job.phases:
        _unfreeze(base, phase)
        model.compile(
            keras.optimizers.Adam(phase.lr),
            loss="sparse_categorical_crossentropy",
            metrics=["accuracy"],
        )
        with report.phase(phase) as clock:
            timed = _Timed(clock)
            model.evaluate(val, callbacks=[timed], verbose=0)
            model.fit(train, epochs=phase.epochs, validation_data=val, callbacks=[timed], verbose=0)


# --- network ----------------------------------------------------------------------------------


def _network(job: Job) -> tuple[keras.Model, keras.Model]:
    base = keras.applications.EfficientNetB0(include_top=False, weights=None, pooling="avg")
    _as_torchvision(base)
    _load(base, _converted(job))
    photos = keras.Input((CROP, CROP, 3))
    pooled = keras.layers.Dropout(0.2)(base(photos, training=False))
    head = keras.layers.Dense(len(job.classes), activation="softmax")
    return base, keras.Model(photos, head(pooled))


def _as_torchvision(base: keras.Model) -> None:
    for layer in base.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.epsilon = _EPSILON
        elif isinstance(layer, keras.layers.ZeroPadding2D):
            far = max(max(sides) for sides in layer.padding)
            layer.padding = ((far, far), (far, far))


def _converted(job: Job) -> dict[str, np.ndarray]:
    path = job.split.with_name("weights.npz")
    if not path.exists():
        command = [sys.executable, "-c", _CONVERT, str(job.weights), str(path)]
        subprocess.run(command, check=True)
    with np.load(path) as arrays:
        return {n: a for n, a in arrays.items() if not n.endswith("num_batches_tracked")}


def _load(base: keras.Model, arrays: dict[str, np.ndarray]) -> None:
    """Both libraries list what has weights in the same order."""
    normalization = next(x for x in base.layers if isinstance(x, keras.layers.Normalization))
    mean, deviation = np.array(MEAN, np.float32), np.array(STD, np.float32)
    normalization.set_weights([mean, deviation**2, np.int64(0)])
    normalization.finalize_state()
    modules = _modules(arrays)
    for layer in base.layers:
        if layer.weights and layer is not normalization:
            layer.set_weights(_keras_order(layer, next(modules)))
    assert next(modules, None) is None


def _modules(arrays: dict[str, np.ndarray]) -> Iterator[list[np.ndarray]]:
    """The arrays of each module of the state dict, in its order."""
    modules: dict[str, list[np.ndarray]] = {}
    for name, array in arrays.items():
        modules.setdefault(name.rpartition(".")[0], []).append(array)
    yield from modules.values()


def _keras_order(layer: keras.Layer, arrays: list[np.ndarray]) -> list[np.ndarray]:
    if isinstance(layer, keras.layers.BatchNormalization):
        return arrays  # weight, bias, mean, variance in both
    kernel, *bias = arrays
    depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
    return [kernel.transpose((2, 3, 0, 1) if depthwise else (2, 3, 1, 0)), *bias]


def _unfreeze(base: keras.Model, phase: Phase) -> None:
    """Keras' own names: block7a_... and top_conv are torchvision's features.7 and features.8."""
    prefixes = {"features": "", "features.7": "block7", "features.8": "top_"}
    chosen = tuple(prefixes[name] for name in phase.unfrozen if name in prefixes)
    base.trainable = True
    for layer in base.layers:
        norm = isinstance(layer, keras.layers.BatchNormalization)
        layer.trainable = layer.name.startswith(chosen) and not norm


# --- photos -----------------------------------------------------------------------------------


def _batches(job: Job, split: Literal["train", "val"]) -> tf.data.Dataset:
    """Decoded and resized once, kept in memory as uint8; shuffled and augmented in every epoch."""
    photos = job.photos(split)
    moving = job.augment and split == "train"
    resize, crop = (CROP_FROM, CROP_FROM) if moving else (RESIZE, CROP)
    rows = tf.data.Dataset.from_tensor_slices(
        ([str(path) for path, _ in photos], [label for _, label in photos])
    )
    rows = rows.map(lambda path, label: (_photo(path, resize, crop), label), tf.data.AUTOTUNE)
    rows = rows.cache()
    if split == "train":
        rows = rows.shuffle(len(photos), seed=job.seed)
    if moving:
        rows = rows.map(
            lambda p, y: (tf.image.random_crop(p, (CROP, CROP, 3)), y), tf.data.AUTOTUNE
        )
    batches = rows.batch(BATCH)
    if moving:
        change = _augmentation()
        batches = batches.map(lambda p, y: (change(p, training=True), y), tf.data.AUTOTUNE)
    return batches.prefetch(tf.data.AUTOTUNE)


def _photo(path: tf.Tensor, resize: int, crop: int) -> tf.Tensor:
    photo = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
    size = tf.cast(tf.shape(photo)[:2], tf.float32)
    size = tf.cast(tf.round(size * resize / tf.reduce_min(size)), tf.int32)
    photo = tf.image.resize(photo, size, "bicubic", antialias=True)
    photo = tf.image.resize_with_crop_or_pad(photo, crop, crop)
    return tf.cast(tf.clip_by_value(tf.round(photo), 0, 255), tf.uint8)


def _augmentation() -> keras.Sequential:
    layers = keras.layers
    return keras.Sequential(
        [
            layers.RandomRotation(TURN, fill_mode="reflect"),
            layers.RandomBrightness(BRIGHTNESS, value_range=(0, 255)),
            layers.RandomContrast((1 - 1 / CONTRAST, CONTRAST - 1), value_range=(0, 255)),
            layers.GaussianNoise(NOISE),
        ]
    )
