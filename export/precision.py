"""The precisions of an exported model, what is measured of it, and what it must hold (stdlib)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: Final[tuple[Precision, ...]] = ("fp32", "fp16", "int8")

# For fp32. EfficientNet-B0 with trained weights reaches 3.3e-5 at logits of 17; float64 shows that
# PyTorch and ONNX Runtime have equal parts in it, which is what rounding alone looks like.
TOLERANCE: Final = 5e-5
# Of the largest logit, for fp16 and int8. Half precision takes EfficientNet-B0 up to 1.2% off.
COARSE_TOLERANCE: Final = 0.05
# For fp16: four steps between neighbouring numbers of half precision, as a part of the largest
# logit. EfficientNet-B0's logits are off by less than one in the mean, and by twelve at most.
HALF_TIE: Final = 4 * 2**-10
# The share of the photos that must get PyTorch's class.
SAME_CLASS: Final = {"fp32": 1.0, "fp16": 0.999}
# How much of the validation accuracy int8 may cost: one point.
LARGEST_LOSS: Final = 0.01


@dataclass(frozen=True)
class Parity:
    """What was measured over `photos` photos.

    Differences are the largest absolute ones, between PyTorch and ONNX Runtime and between batch
    sizes. `top1_agreement` is a fraction, in which the `ties` count as agreeing; `accuracy` and
    `accuracy_pytorch` are the fractions of the photos that each has right. `kept` names what an
    int8 model still computes in float32.
    """

    photos: int
    photos_missing: int
    max_abs_logit_difference: float
    max_abs_probability_difference: float
    max_abs_batch_difference: float
    max_abs_logit: float
    tolerance: float
    top1_agreement: float
    ties: int
    accuracy: float
    accuracy_pytorch: float
    provider: str
    precision: Precision = "fp32"
    kept: tuple[str, ...] = ()

    @property
    def loss(self) -> float:
        """Of accuracy, against PyTorch; below zero where the model has more photos right."""
        return self.accuracy_pytorch - self.accuracy

    @property
    def passed(self) -> bool:
        """Whether the model may be written. Never true where a figure is NaN."""
        steady = self.max_abs_batch_difference <= self.tolerance
        if self.precision == "int8":
            return steady and self.loss <= LARGEST_LOSS + 1e-9  # fractions of photos, rounded
        return (
            steady
            and self.max_abs_logit_difference <= self.tolerance
            # Softmax never widens a difference, so the same bound holds.
            and self.max_abs_probability_difference <= self.tolerance
            and self.top1_agreement >= SAME_CLASS[self.precision]
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"kept": list(self.kept)}


def tolerance_for(size: float, precision: Precision = "fp32") -> float:
    """The largest accepted difference of a logit, where the largest logit is `size`.

    For fp32 TOLERANCE for logits between 1 and 10 in size, where trained networks have theirs.
    Rounding grows with the size, so larger logits get more; networks with smaller ones (a fresh
    head) get less, or the comparison would accept anything.
    """
    if precision == "fp32":
        return TOLERANCE * max(0.01, min(size, 1.0), size / 10)
    return COARSE_TOLERANCE * max(0.01, size)


def tie_for(size: float, precision: Precision) -> float:
    """How far apart two logits may be in PyTorch to count as equally good."""
    if precision == "fp32":
        return tolerance_for(size)
    return HALF_TIE * size if precision == "fp16" else 0.0
