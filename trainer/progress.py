"""What the user sees while a training runs: one bar a phase, one line an epoch, a summary."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from tqdm import tqdm

from trainer.schema import EpochRecord


class Progress:
    """One bar over `photos` photos, of all epochs of all that is trained: images/s, time left.

    Without a terminal only the line at the end of each epoch is printed.
    """

    def __init__(self, photos: int) -> None:
        self._started = time.perf_counter()
        self._bar: tqdm[Any] = tqdm(
            total=photos, unit="img", disable=None, leave=False, dynamic_ncols=True
        )

    def __enter__(self) -> Progress:
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

    def start_epoch(self, phase: str, phase_epoch: int, epochs: int) -> None:
        self._bar.set_description(f"{phase} {phase_epoch}/{epochs}", refresh=False)

    def batch(self, photos: int, loss: float, accuracy: float) -> None:
        self._bar.set_postfix_str(f"loss {loss:.3f}, acc {accuracy:.1%}", refresh=False)
        self._bar.update(photos)

    def epoch(self, records: Sequence[tuple[str, EpochRecord]], epochs: int) -> None:
        """The records of the epoch that ended, one for each run, with the runs' labels."""
        if len(records) == 1:
            tqdm.write(epoch_line(records[0][1], epochs))
        elif records:
            tqdm.write(shared_line(records, epochs))


def shared_line(records: Sequence[tuple[str, EpochRecord]], epochs: int) -> str:
    """One epoch of several runs in one line: how many, how fast, and the best of them."""
    label, best = max(records, key=lambda pair: pair[1].rank)
    seconds = sum(record.seconds for _, record in records)
    line = f"epoch {best.phase_epoch:>3}/{epochs} | {len(records)} runs | {seconds:5.1f} s"
    if best.phase_epoch == 0:
        return f"{line} | before any step: val acc {best.val_acc:6.2%}"
    return f"{line} | best now: val acc {best.val_acc:6.2%} loss {best.val_loss:6.4f}, {label}"


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
