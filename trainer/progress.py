"""What the user sees while a training runs: one bar a phase, one line an epoch, a summary."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

from trainer.schema import EpochRecord


class PhaseProgress:
    """A bar over all photos of all epochs of a phase: images/s, time left, running figures.

    Without a terminal only the line at the end of each epoch is printed.
    """

    def __init__(self, phase: str, epochs: int, photos: int) -> None:
        self._phase, self._epochs = phase, epochs
        self._started = time.perf_counter()
        self._bar: tqdm[Any] = tqdm(
            total=epochs * photos, unit="img", disable=None, leave=False, dynamic_ncols=True
        )

    def __enter__(self) -> PhaseProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def start_epoch(self, phase_epoch: int) -> None:
        self._bar.set_description(f"{self._phase} {phase_epoch}/{self._epochs}", refresh=False)

    def batch(self, photos: int, loss: float, accuracy: float) -> None:
        self._bar.set_postfix_str(f"loss {loss:.3f}, acc {accuracy:.1%}", refresh=False)
        self._bar.update(photos)

    def epoch(self, record: EpochRecord) -> None:
        tqdm.write(epoch_line(record, self._epochs))


def epoch_line(record: EpochRecord, epochs: int) -> str:
    """One epoch in one line, in fixed columns."""
    head = f"{record.phase} {record.phase_epoch:>3}/{epochs}"
    if record.train_loss is None or record.train_acc is None:
        trained = "before any step".ljust(29)
    else:
        trained = f"train loss {record.train_loss:6.4f} acc {record.train_acc:6.1%}"
    validated = f"val loss {record.val_loss:6.4f} acc {record.val_acc:6.2%}"
    rate = "" if record.train_loss is None else f" | {record.images_per_second:5.0f} img/s"
    return f"{head} | {trained} | {validated} | {record.seconds:5.1f} s{rate}"


def summary(phase: str, best: EpochRecord, boundary: EpochRecord | None, seconds: float) -> str:
    """Three lines at the end of a phase; `boundary` is the finetune phase's epoch 0."""
    total = f" ({best.epoch} in all)" if best.epoch != best.phase_epoch else ""
    lines = [
        f"{phase} done in {seconds:.0f} s. Best epoch: {best.phase_epoch}{total}",
        f"  validation accuracy {best.val_acc:.2%}, loss {best.val_loss:.4f}",
    ]
    if boundary is None:
        lines.append(f"  top-5 accuracy {best.val_top5:.2%}, macro F1 {best.val_macro_f1:.4f}")
    else:
        points = (best.val_acc - boundary.val_acc) * 100
        change = best.val_loss - boundary.val_loss
        lines.append(
            f"  since unfreezing: {points:+.2f} points of accuracy, {change:+.4f} loss "
            f"(at the boundary {boundary.val_acc:.2%}, {boundary.val_loss:.4f})"
        )
    return "\n".join(lines)
