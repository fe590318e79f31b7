"""A runs folder in which every name that others choose is an attempt at something."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from explorer.annotations import Annotation, save_annotation
from tests.explorer_runs import TRUNK_ACCURACY, write_run
from trainer.config import Config
from trainer.results import Entry, Table, write_table
from trainer.runlog import Run, read_run
from trainer.schema import LR_FIND

# Pages, and what to choose on them so that every part of them is seen.
PAGES: dict[str, list[dict[str, str]]] = {
    "compare": [{}, {"axis": "Before and after", "colour": "Optimizer", "dash": "Schedule"}],
    "runs": [{"archived": "true"}],
    "sweep": [{}, {"maps": "Each schedule"}],
    "results": [{}],
    "changed": [{"part": part} for part in ("Classes", "Confusions", "Photos", "Confidence")],
    "classify": [{"heat": "true"}],
    "exporting": [{}],
    "importing": [{"as": "A transfer phase and its finetunes"}],
}
MARK = "Evil7"  # in every one of them, so that they are found again


def hostile_names(origin: str) -> list[str]:
    """Names that would fetch something of `origin`, run a script, or change what a page says."""
    bare = origin.removeprefix("http:")
    backslashes = bare.replace("/", "\\")
    return [
        f"<script>fetch('{origin}/script')</script>{MARK}",
        f'"><img src="{origin}/img" onerror="fetch(\'{origin}/onerror\')">{MARK}',
        f"<img src={backslashes}\\b>{MARK}",  # as a folder may be called: without a slash
        f"![{MARK}]({origin}/markdown)",
        f"![{MARK}]({backslashes}\\markdown)",
        f"[{MARK}](javascript:fetch('{origin}/link'))",
        f"{origin}/{MARK}",
        f"<{origin}/{MARK}>",
        f'=HYPERLINK("{origin}/formula";"{MARK}")',
        f"\t=1+1{MARK}",
        f"\r@SUM(1){MARK}",
        f"../../../../etc/{MARK}",
        f"$\\href{{javascript:fetch('{origin}/katex')}}{{{MARK}}}$",
        f"$$\\includegraphics{{{origin}/tex}}{MARK}$$",
        f":material/delete: :red[{MARK}] :small[x]",
        f"</style><style>@import '{origin}/css';body{{background:url({origin}/bg)}}{MARK}",
        f"</svg><image href='{origin}/svg'/>{MARK}",
        f"{{{{constructor.constructor('fetch(\"{origin}/vega\")')()}}}}{MARK}",
        f"\x1b]8;;{origin}/terminal\x07{MARK}\x1b[2J\u202e",
        f"`{MARK}` | a | b |\n\n# {MARK}",
    ]


def write_hostile(runs_dir: Path, names: Sequence[str], root: str = "") -> Run:
    """A trunk, a control, finetunes of many settings, a run that is broken, a learning-rate test
    and an imported run, all trained on photos in `root`; returns the newest finetune."""
    common = {
        "classes": list(names),
        "dataset": {
            "name": names[3],
            "root": root or f"/nowhere/{names[3]}",
            "fingerprint": "f",
            "counts": {"train": 40, "val": 2 * len(names)},
            "rejected": [{"file": name, "reason": name} for name in names],
        },
        "recipe": names[0],
        "environment": {"device": names[0], "cpu": names[1], "versions": {names[2]: names[3]}},
        "model": {"arch": names[4], "head": names[0], "pool": names[1]},
        "weights": {"source": names[5], "sha256": names[5]},
    }
    trunk = write_run(runs_dir, "trunk", TRUNK_ACCURACY, **common | {"config": _config(names, 0)})
    _answers(trunk.predictions("after"), names, 0)
    run_id = ""
    for number in range(6):
        config = _config(names, number)
        sweep = {"id": names[0], "name": names[3], "group": names[7], "member": number, "of": 6}
        sweep |= {"key": names[1], "control": not number}
        child = write_run(
            runs_dir,
            f"child-{number}",
            [0.70, 0.74 + number / 100],
            "finetune" if number else "transfer",
            3,
            parent_run_id=trunk.run_id,
            parent_checkpoint={"file": "transfer-last.pt", "sha256": names[0]},
            **common | {"config": config, "sweep": sweep},
        )
        _answers(child.predictions("before"), names, 0)
        _answers(child.predictions("after"), names, number)
        noted = Annotation(names[number], names[number + 6], tuple(names[3:7]))
        save_annotation(child.path, noted)
        run_id = child.run_id
    imported = {"format": names[0], "path": names[3], "files": [{"path": names[3], "sha256": "0"}]}
    write_run(runs_dir, "imported", [0.1, 0.2], imported=imported, config={"lr": names[3]})
    broken = write_run(runs_dir, "broken", [0.1])
    (broken.path / "run.json").write_text(json.dumps({"schema_version": names[3]}))
    _rate_test(runs_dir, names)
    entries = tuple(Entry(name, run_id, {"val_acc": 0.5}) for name in names[:4])
    for name in (f"![{MARK}]", f"<b>{MARK}"):
        write_table(runs_dir, Table(name, names[3], names[5], entries))
    return read_run(runs_dir / run_id)


def _config(names: Sequence[str], number: int) -> dict[str, object]:
    text = {"optimizer": names[number], "phase": names[3], "data": names[3], "run_name": names[0]}
    schedule = {"name": names[number % 2 + 3], "decay": names[5], "drop": names[6]}
    known = Config("finetune", seed=number % 2).to_dict() | text
    return known | {"lr": 10.0 ** -(3 + number % 3), "unfreeze": names[9], "schedule": schedule}


def _answers(path: Path, names: Sequence[str], shift: int) -> None:
    """Two photos of each class; the network is wrong about every fourth, which shifts."""
    labels = np.repeat(np.arange(len(names)), 2)
    wrong = (np.arange(len(labels)) + shift) % 4 == 0
    said = np.where(wrong, (labels + 1) % len(names), labels)
    logits = 3 * np.eye(len(names), dtype=np.float32)[said]
    files = np.array([f"{names[label]}/{n}.jpg" for n, label in enumerate(labels)])
    np.savez(path, logits=logits, labels=labels, files=files)


def _rate_test(runs_dir: Path, names: Sequence[str]) -> None:
    content = {
        "config": {"phase": names[3], "optimizer": names[0], "batch_size": names[3]},
        "model": {"arch": names[3]},
        "parent_run_id": names[3],
        "rates": [1e-5, 1e-4, 1e-3],
        "losses": [1.0, 0.8, 0.9],
        "smoothed": [1.0, 0.9, 0.85],
    }
    folder = runs_dir / LR_FIND
    folder.mkdir()
    for name in (f"![{MARK}]", f"<b>{MARK}"):
        (folder / f"{name}.json").write_text(json.dumps(content))
