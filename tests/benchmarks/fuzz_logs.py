"""Feed damaged logs and run files to everything that reads them, for some minutes.

python -m tests.benchmarks.fuzz_logs --minutes 5 --seed 1 [--keep DIR]

Each case is one file of a folder of other tools' logs (TensorBoard events, CSV files, YAML, JSON)
or of a runs folder (run.json, metrics.jsonl, test.json, annotations.json, parity.json, predictions,
a range test, a recipe, lists of photos), in which a value has been replaced by one that is too
large, of another type, or no text, or the bytes are damaged as in `fuzz_images`. The checksums of
events are right. A case fails where `python -m trainer import`, the run reader or what the explorer
computes of its runs raises anything but a ThawError, takes more than 5 seconds or 1 GiB, or ends
the process. The exit status is 1 where any has failed.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

from explorer.annotations import Annotation, save_annotation
from explorer.compare import summaries, table, verdict
from explorer.conclusions import flags
from explorer.curves import long_frame
from explorer.data import Library, epochs_frame, lineage
from explorer.evidence import findings
from explorer.figures import figures_or_reason
from explorer.lr_charts import rate_tests
from explorer.overview import Overview, View, shown
from explorer.settings import varied, with_settings
from explorer.sweep_members import groups, members
from tests.benchmarks.fuzzing import Fuzzer, damaged, fuzz, parser
from tests.explorer_runs import write_finetune, write_trunk
from trainer.config import Config
from trainer.evidence import load_predictions
from trainer.imports.command import main as import_logs
from trainer.listing import list_photos, read_excluded
from trainer.recipe import build_sweep_parser, read_recipe
from trainer.reproduce import command
from trainer.runlog import RunError, checkpoint_path, list_runs
from trainer.schema import ThawError
from trainer.tested import read_tested

_ODD: Final[tuple[Any, ...]] = (
    *(None, True, 0, -1, 0.5, 1e308, -1e308, 10**400, -(10**400), float("nan"), float("inf")),
    *("", "x", "\ud800", "a\0b", "../../x", "/etc/passwd", "<b>x", "=1+1", "1e999", "x" * 100_000),
    *([], {}, [1], [None], [{}], {"a": 1}, {"name": []}, [[]] * 50),
)
_ODD_TEXTS: Final = (
    *("", "nan", "inf", "-1", "1e999", "9" * 5000, "9" * 400, "9" * 400 + ":00", "1:2:3:4", "a\0b"),
    *("\ud800", '"', "'", "[" * 5000, "{" * 5000, "&a [*a]", "<<: *a", "!!python/object:os.system"),
    *(
        "0x" + "f" * 5000,
        "1_0",
        "٣",
        "true",
        "~",
        "2020-99-99",
        "1:" * 5000 + "1",
        "=1+1",
        "x" * 300,
    ),
)


# --- whole folders ------------------------------------------------------------------------------


def write_logs(folder: Path) -> None:
    """One log of each tool."""
    for name, content in _LOGS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    for stream in ("train", "validation"):
        path = folder / "board" / stream / "events.out.tfevents.1600000000.host.0"
        path.parent.mkdir(parents=True)
        path.write_bytes(_records(_events()))


_LOGS: Final = {
    "keras/training.csv": "epoch,accuracy,loss,val_accuracy\n0,.5,1,.4\n1,.6,.9,.5\n",
    "fast/history.csv": "epoch,train_loss,valid_loss,accuracy,time\n0,1,1,.5,0:12\n1,1,1,1,1:2:3\n",
    "light/metrics.csv": "epoch,step,val_loss,val_acc,lr-Adam\n,0,,,.1\n0,9,1,.5,\n1,19,.8,.6,\n",
    "light/hparams.yaml": "lr: 1e-3\nbatch_size: 32\noptimizer: adam\na: &a {b: [1, 2]}\nc: *a\n",
    "hf/trainer_state.json": json.dumps(
        {
            "train_batch_size": 8,
            "log_history": [
                {"epoch": n, "step": 9 * n, "eval_accuracy": 0.5, "eval_loss": 1.0, "loss": 1.0}
                for n in (1, 2, 3)
            ],
        }
    ),
}


def _events() -> list[bytes]:
    made = [Event(wall_time=1.6e9, file_version="brain.Event:2")]
    for step in range(3):
        event = Event(wall_time=1.6e9 + step, step=step)
        event.summary.value.add(tag="epoch_accuracy", simple_value=0.5)
        event.summary.value.add(tag="epoch_loss").tensor.CopyFrom(_tensor(1.0))
        event.summary.value[1].metadata.plugin_data.plugin_name = "scalars"
        made.append(event)
    return [event.SerializeToString() for event in made]


def _tensor(value: float) -> Any:
    from tensorboard.util.tensor_util import make_tensor_proto

    return make_tensor_proto(np.float32(value))


def _records(events: list[bytes]) -> bytes:
    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    for event in events:
        writer.write(event)
    return buffer.getvalue()


def write_runs(folder: Path) -> None:
    """A trunk and a finetune of it with all that a run may have beside it."""
    config = Config("finetune", data="x").to_dict()
    trunk = write_trunk(folder)
    run = write_finetune(folder, trunk, "fine", [0.7, 0.75])
    run.update(config=config, sweep={"id": "s", "name": "s", "member": 0, "of": 1, "group": "g"})
    run.update(parent_checkpoint={"file": "transfer-last.pt"}, imported={"path": "x", "files": []})
    for which in ("before", "after"):
        logits = np.eye(2, dtype=np.float32)[[0, 1, 0]]
        arrays = {
            "logits": logits,
            "labels": np.array([0, 1, 1]),
            "files": np.array(["a", "b", "c"]),
        }
        np.savez_compressed(run.predictions(which), **arrays)
    save_annotation(run.path, Annotation("mine", "note", ("tag",)))
    tested = {"photos": 3, "accuracy": 0.5, "loss": 1.0, "top5": 1.0, "macro_f1": 0.5, "epoch": 4}
    (run.path / "test.json").write_text(json.dumps({**tested, "checkpoint_sha256": "a" * 64}))
    (run.path / "parity.json").write_text(json.dumps(_PARITY))
    (folder / "lr-find").mkdir()
    (folder / "lr-find" / "test.json").write_text(json.dumps(_RATES))
    recipe = '[sweep]\nphase = "finetune"\nlr = [1e-4, 1e-5]\nunfreeze = ["10", "20"]\nepochs = 2\n'
    (folder / "recipe.toml").write_text(recipe)
    (folder / "split.csv").write_text("path,split\na/1.jpg,train\na/2.jpg,val\nb/1.jpg,train\n")
    (folder / "excluded.txt").write_text('# said\na/1.jpg\n"b/1.jpg"\n')
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"):
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "photos" / name).touch()


_PARITY: Final = {
    **dict.fromkeys(("photos", "photos_missing", "ties"), 3),
    **dict.fromkeys(("top1_agreement", "max_abs_logit_difference", "tolerance", "accuracy"), 0.5),
    "checkpoint_sha256": "a" * 64,
    "onnx_sha256": "b" * 64,
    "kept_layers": [],
    "versions": {"onnx": "1"},
    "precision": "fp32",
    "provider": "CPU",
}
_RATES: Final = {
    "rates": [1e-5, 1e-4, 1e-3],
    "losses": [1.0, 0.9, 0.8],
    "smoothed": [1.0, 0.9, 0.8],
    "steep": 1e-4,
    "valley": 1e-4,
    "diverged": False,
    "config": {"phase": "transfer", "optimizer": "adam", "batch_size": 8},
    "model": {"arch": "x"},
}


# --- one file of them ---------------------------------------------------------------------------


def make(rng: random.Random, folder: Path, files: list[Path]) -> bytes:
    """The name of a file below `folder`, a null byte, and its content with something wrong."""
    file = rng.choice(files)
    return (
        str(file).encode()
        + b"\0"
        + _changed(rng, file, (folder / file).read_bytes(), files, folder)
    )


def _changed(
    rng: random.Random, file: Path, content: bytes, files: list[Path], folder: Path
) -> bytes:
    if "tfevents" in file.name and rng.random() < 0.8:
        events = _events()
        place = rng.randrange(len(events))
        events[place] = damaged(rng, events[place], events)
        return _records(events)
    how = _BY_SUFFIX.get(file.suffix)
    if how is not None and rng.random() < 0.7:
        return how(rng, content.decode()).encode("utf-8", "surrogatepass")
    others = [(folder / other).read_bytes() for other in rng.sample(files, 3)]
    return damaged(rng, content, others)


def _json(rng: random.Random, text: str) -> str:
    document = json.loads(text)
    for _ in range(rng.choice((1, 1, 2, 5))):
        places = list(_places(document))
        holder, key = rng.choice(places)
        if rng.random() < 0.1 and isinstance(holder, dict):
            holder.pop(key, None)
        else:
            holder[key] = copy.deepcopy(rng.choice(_ODD))
        if not list(_places(document)):
            break
    return json.dumps(document)


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    keys = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(keys):
        yield document, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _lines(rng: random.Random, text: str) -> str:
    lines = text.splitlines()
    place = rng.randrange(len(lines))
    lines[place] = _json(rng, lines[place])
    return "\n".join(lines) + "\n"


def _words(separators: str, rng: random.Random, text: str) -> str:
    """One word replaced, or put before it or behind."""
    places = [0, *(place + 1 for place, letter in enumerate(text) if letter in separators)]
    place = rng.choice(places)
    end = next((n for n in range(place, len(text)) if text[n] in separators), len(text))
    return text[:place] + rng.choice(_ODD_TEXTS) + text[rng.choice((place, end)) :]


_BY_SUFFIX: Final[Mapping[str, Callable[[random.Random, str], str]]] = {
    ".json": _json,
    ".jsonl": _lines,
    ".csv": partial(_words, ",\n"),
    ".yaml": partial(_words, " \n"),
    ".toml": partial(_words, " \n"),
    ".txt": partial(_words, "\n"),
}


# --- all that reads them ------------------------------------------------------------------------


def read(case: bytes, logs: Path, runs: Path, pristine: Path) -> str:
    """What came of a case: the import's exit status, or how many runs are read."""
    name, _, content = case.partition(b"\0")
    kind, _, rest = name.decode().partition("/")
    file = {"logs": logs, "runs": runs}[kind] / rest
    file.write_bytes(content)
    try:
        return _import(logs) if kind == "logs" else _look(runs)
    finally:
        shutil.copyfile(pristine / name.decode(), file)


def _import(logs: Path) -> str:
    with tempfile.TemporaryDirectory() as target:
        arguments = [str(logs), "--phase", "transfer", "--runs-dir", target]
        with contextlib.redirect_stdout(io.StringIO()) as said:
            status = import_logs(arguments)
        said.getvalue().encode()
        count = len(list_runs(Path(target)))
        _look(Path(target))
    return f"import: status {status}, {count} runs"


def _look(folder: Path) -> str:
    snapshot = Library(folder).snapshot()
    selected = list(snapshot.runs)
    curves, _ = lineage(snapshot, selected)
    frame = with_settings(epochs_frame(snapshot, curves), snapshot)
    long_frame(frame, "accuracy", "total", ["Train", "Validation"])
    rows = summaries(snapshot, selected)
    table(rows)
    told = [*map(verdict, rows), *varied(snapshot, selected)]
    findings(snapshot, selected)
    shown(Overview().frame(snapshot), View())
    for group in groups(snapshot):
        members(snapshot, group.members)
    for run in snapshot.runs.values():
        told += flags(run)
        for ask in (read_tested, command, _before, _predictions):
            with contextlib.suppress(ThawError):
                ask(run)
        figures_or_reason(run.path / "parity.json")
    rate_tests(folder)
    _settings(folder)
    return f"runs: {len(snapshot.runs)} read, {len(snapshot.broken)} refused"


def _before(run: Any) -> None:
    with contextlib.suppress(RunError):
        checkpoint_path(run, "before")


def _predictions(run: Any) -> None:
    load_predictions(run.predictions("after"))


def _settings(folder: Path) -> None:
    """What a user names on the command line."""
    if not (folder / "recipe.toml").exists():
        return
    with contextlib.suppress(ThawError):
        read_recipe(folder / "recipe.toml", build_sweep_parser())
    with contextlib.suppress(ThawError):
        read_excluded(folder / "excluded.txt")
    with contextlib.suppress(ThawError):
        photos = str(folder / "photos")
        list_photos(Config("transfer", data=photos, split_file=folder / "split.csv"))


def main() -> int:
    args = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        pristine, folders = Path(scratch, "pristine"), Path(scratch, "damaged")
        write_logs(pristine / "logs")
        write_runs(pristine / "runs")
        shutil.copytree(pristine, folders)
        below = sorted(path.relative_to(pristine) for path in pristine.rglob("*") if path.is_file())
        files = [path for path in below if path.suffix != ".jpg"]
        fuzzer = Fuzzer(
            lambda rng: make(rng, pristine, files),
            lambda case: read(case, folders / "logs", folders / "runs", pristine),
        )
        return 1 if fuzz(fuzzer, args.seed, args.minutes, args.keep) else 0


if __name__ == "__main__":
    sys.exit(main())
