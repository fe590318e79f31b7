"""`make demo`: the whole path on the embedded sample, each command shown before it runs."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from trainer.runlog import Run, list_runs  # noqa: E402

RUNS = ROOT / "runs"
TRAININGS = (
    "--phase transfer --epochs 6 --lr 3e-3 --schedule exponential --decay 0.3",
    "--phase finetune --epochs 4 --lr 1e-4 --unfreeze 20",
    "--phase finetune --epochs 4 --lr 1e-6 --unfreeze 10",
)


def command(*words: str) -> None:
    """Show and run `python -m ...`; a failure ends the demo with its status."""
    print(f"\n$ python -m {shlex.join(words)}", flush=True)
    status = subprocess.run([sys.executable, "-m", *words], cwd=ROOT).returncode
    if status:
        sys.exit(status)


def best_finetune(since: float) -> Run:
    runs = [
        run for run in list_runs(RUNS) if run.phase == "finetune" and run.info["started"] >= since
    ]
    return max(runs, key=lambda run: max(e.rank for e in run.epochs if e.phase_epoch > 0))


def three_photos(run: Run) -> list[str]:
    """Validation photos of three classes: the network has not trained on them."""
    root = Path(run.info["dataset"]["root"])
    with np.load(run.predictions("after"), allow_pickle=False) as saved:
        _, rows = np.unique(saved["labels"], return_index=True)
        return [str(root / saved["files"][row]) for row in rows[:: max(1, len(rows) // 3)][:3]]


def main() -> None:
    started = time.time()
    for training in TRAININGS:
        command("trainer", "--data", "sample", *training.split())
    run = best_finetune(started)
    command("export", run.run_id)
    command("export.infer", str(run.path.relative_to(ROOT) / "model.onnx"), *three_photos(run))
    print(f"\nDone in {time.time() - started:.0f} s. The curves: streamlit run streamlit_app.py")


if __name__ == "__main__":
    main()
