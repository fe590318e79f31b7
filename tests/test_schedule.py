"""The labs' learning rate policies, as their formulas state them."""

from __future__ import annotations

import math

import pytest

from trainer.config import ConfigError, Schedule
from trainer.schedule import learning_rate


def rates(schedule: Schedule, lr0: float, epochs: int) -> list[float]:
    return [learning_rate(schedule, lr0, epoch, epochs) for epoch in range(epochs)]


def test_constant() -> None:
    assert rates(Schedule(), 1e-8, 3) == [1e-8] * 3


def test_exponential_of_the_oregon_lab() -> None:
    expected = [0.01 * math.exp(-0.3 * epoch) for epoch in range(25)]
    assert rates(Schedule("exponential", decay=0.3), 0.01, 25) == pytest.approx(expected)


def test_step() -> None:
    schedule = Schedule("step", drop=0.5, epochs_drop=2)
    assert rates(schedule, 1.0, 6) == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_cosine_after_warmup() -> None:
    values = rates(Schedule("cosine", warmup=2), 0.9, 6)
    assert values[:3] == pytest.approx([0.3, 0.6, 0.9])
    assert values == pytest.approx([0.3, 0.6, 0.9, 0.7682, 0.45, 0.1318], abs=1e-4)


def test_warmup_goes_before_any_schedule() -> None:
    schedule = Schedule("exponential", decay=1.0, warmup=1)
    assert rates(schedule, 1.0, 3) == pytest.approx([0.5, 1.0, math.exp(-1)])


@pytest.mark.parametrize(
    ("field", "value"), [("name", "linear"), ("decay", -1), ("drop", 0), ("epochs_drop", 0)]
)
def test_nonsense_is_refused_with_the_flag(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"--(schedule|{field.replace('_', '-')})"):
        Schedule(**{field: value})  # type: ignore[arg-type]
