"""Where a network looked: Grad-CAM (Selvaraju et al., 2017), computed by captum.

torch and captum are imported only when a network is at hand.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.preprocess import Photo
from trainer.schema import ThawError

if TYPE_CHECKING:
    import torch
    from torch import nn

# Viridis, at equal distances: lightness rises throughout, so that it reads without colour vision.
RAMP: Final = ("#440154", "#3b528b", "#21918c", "#5ec962", "#fde725")
# The same everywhere: were faint heat more transparent, more heat would not always be lighter.
_COVER: Final = 0.5

_ROWS: Final = ("upper", "middle", "lower")
_COLUMNS: Final = ("left", "middle", "right")


class GradCamError(ThawError):
    """Grad-CAM is not to be had: captum is missing, or the network has no feature map."""


@dataclass(frozen=True)
class Heat:
    """Where a photo spoke for one class: float32 [h, w] in 0..1, the strongest cell at 1; all 0
    where nothing in the photo spoke for it."""

    cells: NDArray[np.float32] = field(repr=False)

    @property
    def strongest(self) -> str:
        """The ninth of the photo that holds the strongest cell, such as "upper left"."""
        if not self.cells.any():
            return ""
        place = np.unravel_index(self.cells.argmax(), self.cells.shape)
        thirds = zip(place, self.cells.shape, strict=True)
        row, column = (int(3 * (at + 0.5) // side) for at, side in thirds)
        words = dict.fromkeys((_ROWS[row], _COLUMNS[column]))  # "middle", not "middle middle"
        return " ".join(words)


class GradCam:
    """Grad-CAM of one network in evaluation mode. Any number of threads may use one at once.

    `network` maps float32 [N, 3, crop, crop] to logits [N, classes], and is left as it is. Raises
    GradCamError where captum is missing, or where no feature map lies in front of the head.
    """

    def __init__(self, network: nn.Module, crop: int) -> None:
        try:
            from captum.attr import LayerGradCam  # type: ignore[import-untyped]
        except ImportError:
            raise GradCamError(
                "Grad-CAM needs the package captum, which is not installed: pip install captum"
            ) from None
        # captum hangs hooks on modules, and other sessions classify with `network` meanwhile. The
        # copy has modules of its own and the same weights.
        shared = {id(one): one for one in chain(network.parameters(), network.buffers())}
        own = copy.deepcopy(network, shared)
        self._method = LayerGradCam(own, _last_feature_map(own, crop))
        self._lock = threading.Lock()

    def heat(self, pixels: torch.Tensor, target: int) -> Heat:
        """What in one normalised photo, float32 [1, 3, crop, crop], spoke for class `target`."""
        import torch

        # Of its own for captum to ask gradients of, which also keeps its warning away.
        photo = pixels.detach().clone().requires_grad_()
        with self._lock, torch.enable_grad():
            found = self._method.attribute(photo, target=target, relu_attributions=True)
        cells: NDArray[np.float32] = found[0, 0].detach().float().numpy()
        cells = np.nan_to_num(cells, nan=0.0, posinf=0.0)
        return Heat(cells / cells.max() if cells.max() > 0 else cells)


def _last_feature_map(network: nn.Module, crop: int) -> nn.Module:
    """The module whose output, channels by height by width, is what gets pooled for the head."""
    from torch import nn

    pools = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
    ran = _outputs(network, crop)
    calls = Counter(module for module, _ in ran)
    for module, shape in reversed(ran):
        if isinstance(module, pools) or _is_vector(shape) or calls[module] > 1:
            continue
        # Photos are square, so a map is too. Tokens, and maps with channels last, are not.
        if len(shape) == 4 and shape[2] == shape[3]:
            return module
        break
    raise GradCamError(
        "Grad-CAM needs a map of channels by height by width in front of the head. A "
        f"{type(network).__name__} has none there."
    )


def _outputs(network: nn.Module, crop: int) -> list[tuple[nn.Module, tuple[int, ...]]]:
    """The modules in the order in which they finish, each with the shape of its output."""
    import torch

    ran: list[tuple[nn.Module, tuple[int, ...]]] = []

    def note(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            ran.append((module, tuple(output.shape)))

    hooks = [module.register_forward_hook(note) for module in network.modules()]
    with torch.no_grad():
        network(torch.zeros(1, 3, crop, crop))
    for hook in hooks:
        hook.remove()
    return ran


def _is_vector(shape: tuple[int, ...]) -> bool:
    """Whether one value for each channel is left of a photo."""
    return sum(side > 1 for side in shape[1:]) <= 1


# --- pictures -----------------------------------------------------------------------------------


def overlay(photo: Photo, heat: Heat) -> Image.Image:
    """The photo in grey under its heat; `photo` is uint8 [side, side, 3], as a network sees it."""
    side = photo.shape[0]
    cells = Image.fromarray(heat.cells).resize((side, side), Image.Resampling.BILINEAR)
    strength = np.asarray(cells).clip(0, 1)
    grey = np.asarray(Image.fromarray(photo).convert("L"), dtype=np.float32)[..., np.newaxis]
    blended = (1 - _COVER) * grey + _COVER * _coloured(strength)
    return Image.fromarray(blended.round().astype(np.uint8))


def _coloured(strength: NDArray[np.float32]) -> NDArray[np.float64]:
    """0..1 [H, W] -> RGB in 0..255 [H, W, 3]."""
    stops = np.array([list(bytes.fromhex(colour[1:])) for colour in RAMP], dtype=np.float64)
    at = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(strength, at, channel) for channel in stops.T], axis=-1)
