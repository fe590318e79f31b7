"""Which run shows what would have happened without unfreezing (no torch)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from trainer.runlog import Run


def controls_by_parent(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs that can be a control, newest first, by the parent that they go on from. `runs` are
    oldest first."""
    controls: dict[str, list[Run]] = {}
    for run in reversed(list(runs)):
        if run.parent_run_id is not None and run.phase == "transfer" and run.status == "done":
            controls.setdefault(run.parent_run_id, []).append(run)
    return controls


def control_of(run: Run, controls: Mapping[str, Sequence[Run]]) -> Run | None:
    """The newest run that trained the same head further, as long and on the same views, with
    everything else still frozen."""
    alike = controls.get(run.parent_run_id or "", ())
    return next((other for other in alike if _conditions(other) == _conditions(run)), None)


def _conditions(run: Run) -> tuple[object, ...]:
    config, dataset = run.info.get("config", {}), run.info.get("dataset", {})
    same = (config.get(name) for name in ("epochs", "batch_size", "augmentation", "views", "seed"))
    return (dataset.get("fingerprint"), *same)
