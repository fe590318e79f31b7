"""The second part of a model card: what the model is worth, and how to use the file."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from export.card_facts import Answers, Card, Network, load_answers
from export.card_markdown import bullets, code, facts, finite, name_list, shown, table
from export.card_training import interval
from export.metadata import INPUT, OUTPUTS
from export.precision import LARGEST_LOSS, SAME_CLASS, Precision
from trainer.cli import inert
from trainer.evidence import (
    Evidence,
    EvidenceError,
    compare,
    points,
    sentence,
)

_LOSS: Final = "Loss"
_PARITY: Final = {
    "precision": "Precision",
    "kept": "Kept in float32",
    "photos": "Validation photos compared",
    "photos_missing": "Validation photos that are gone",
    "top1_agreement": "Same class as PyTorch",
    "ties": "Of these tied in PyTorch itself",
    "accuracy": "Accuracy on them, by the file",
    "accuracy_pytorch": "Accuracy on them, by PyTorch",
    "max_abs_logit_difference": "Largest difference of a logit",
    "max_abs_probability_difference": "Largest difference of a probability",
    "max_abs_batch_difference": "Largest difference between batch sizes",
    "tolerance": "Largest difference allowed",
    "max_abs_logit": "Largest logit",
    "provider": "Computed by",
}
_SHARES: Final = ("top1_agreement", "accuracy", "accuracy_pytorch")
_ALLOWED: Final[Mapping[Precision, str]] = {
    "fp32": "it gave every photo the same class, and no difference was larger than is allowed",
    "fp16": f"it gave at least {SAME_CLASS['fp16']:.1%} of the photos the same class, and no "
    "difference was larger than is allowed",
    "int8": f"its accuracy was at most {100 * LARGEST_LOSS:g} point lower, and the size of the "
    "batch made no larger difference than is allowed. It was calibrated on training photos",
}


def results(card: Card) -> Iterator[str]:
    yield "## Results"
    yield (
        "Measured in training, on the validation photos. How equal the file is to the network that "
        "was measured, the next section says."
    )
    if card.run.status != "done":
        yield f"The run was not done when it was exported; its status was {code(card.run.status)}."
    found = _evidence(card.before, card.after) if card.before else None
    yield _figures_table(card, found)
    if found is not None:
        yield bullets((_versus("After against before unfreezing", found), _versus_control(card)))
    if isinstance(found, Evidence):
        yield _meaning(card)
    yield from _by_class(card, found)


def _figures_table(card: Card, found: Evidence | str | None) -> str:
    """The accuracy with its interval first; a column for each network, and one for the change."""
    networks = [network for network in (card.before, card.after) if network]
    figures = [_figures(network, len(card.classes)) for network in networks]
    rows = [
        [name, *(_figure(name, one[name]) for one in figures), *_change(name, figures)]
        for name in figures[0]
        if any(one[name] is not None for one in figures)
    ]
    spans = [interval(network) for network in networks]
    if any(spans):
        change = ["not known"] * (len(networks) - 1)
        if isinstance(found, Evidence):
            change = [f"{points(found.low)} to {points(found.high)} points"]
        rows.insert(1, ["95% interval", *(span or "not known" for span in spans), *change])
    if not rows:
        return "No figures were saved with the run."
    titles = ["Before unfreezing", "After unfreezing", "Change"] if card.before else ["This model"]
    if card.before:
        titles[0 if card.is_before else 1] += " (this model)"
    return table(["Figure", *titles], rows, numbers=True)


def _figures(network: Network, classes: int) -> dict[str, float | None]:
    """The same names for every network, None for what is not known; all but the loss fractions."""
    record, answers = network.record, network.answers
    top5 = {"Top-5 accuracy": finite(record.val_top5) if record else None}
    return {
        "Accuracy": network.accuracy,
        **(top5 if classes > 5 else {}),
        "Macro F1": finite(record.val_macro_f1) if record else None,
        "Calibration error": answers.calibration_error if answers else None,
        _LOSS: finite(record.val_loss) if record else None,
    }


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "not known"
    return f"{value:.3f}" if name == _LOSS else f"{value:.1%}"


def _change(name: str, figures: Sequence[Mapping[str, float | None]]) -> list[str]:
    if len(figures) == 1:
        return []
    before, after = (one[name] for one in figures)
    if before is None or after is None:
        return ["not known"]
    if name == _LOSS:
        return [f"{after - before:+.3f}".replace("-", "\u2212")]
    return [f"{points(after - before)} points"]


def _evidence(before: Network, after: Network) -> Evidence | str:
    """The comparison photo by photo, or why there is none."""
    if before.answers is None or after.answers is None:
        return (
            "whether there is more than chance to it is not known, because the answers to each "
            "photo were not saved, are damaged, or are those of another epoch."
        )
    try:
        return compare(before.answers.said, after.answers.said)
    except EvidenceError as error:
        return f"not compared. {error}"


def _versus(what: str, found: Evidence | str) -> str:
    return f"{what}: {found if isinstance(found, str) else sentence(found, found.p) + '.'}"


def _versus_control(card: Card) -> str:
    if card.control is None:
        return (
            "There is no control, the head alone trained for as long, so part of the change can "
            "come from training longer."
        )
    answers = load_answers(card.control.predictions("after"), len(card.classes))
    what = f"After unfreezing against the control {code(card.control.run_id)}, the head alone"
    return _versus(what, _evidence(Network(answers, None), card.after))


def _meaning(card: Card) -> str:
    many = f", not adjusted for the {card.sweep:,} runs of the sweep" if card.sweep > 1 else ""
    return (
        "Fixed are photos that only the network after unfreezing has right, broken those that only "
        "the other has right. The interval of the change is a bootstrap over photos, p that of "
        f"McNemar's exact test{many}. Where the two disagree, the test decides."
    )


def _by_class(card: Card, found: Evidence | str | None) -> Iterator[str]:
    """Before and after where both answered the same photos, else of this model alone."""
    if card.own.answers is None:
        return
    networks = [card.before, card.after] if isinstance(found, Evidence) else [card.own]
    recalls = [_recall(one.answers, len(card.classes)) for one in networks if one and one.answers]
    photos = np.bincount(card.own.answers.said.labels, minlength=len(card.classes))
    rows = [
        [
            code(card.classes[i]),
            f"{photos[i]:,}",
            *(f"{recall[i]:.1%}" for recall in recalls),
            *(points(recalls[1][i] - recalls[0][i]) for _ in recalls[1:]),
        ]
        for i in np.flatnonzero(photos)
    ]
    titles = ["Recall before", "Recall after", "Change, points"] if recalls[1:] else ["Recall"]
    yield "### By class"
    yield table(["Class", "Photos", *titles], rows, numbers=True)
    if len(rows) < len(card.classes):
        yield f"No validation photo is of the other {len(card.classes) - len(rows):,} classes."


def _recall(answers: Answers, size: int) -> NDArray[np.float64]:
    """[size]; 0 for a class without photos."""
    labels = answers.said.labels
    right = np.bincount(labels[answers.right], minlength=size)
    return right / np.maximum(1, np.bincount(labels, minlength=size))


def equality(card: Card) -> Iterator[str]:
    import onnxruntime

    from export.parity import BATCH, OTHER_BATCHES

    exported, figures = card.exported, card.exported.parity.to_dict()
    precision, first = exported.metadata.precision, min(BATCH, exported.parity.photos)
    sizes = sorted({first, *(size for size in OTHER_BATCHES if size < first)})
    named = _PARITY | {
        "max_abs_batch_difference": "Largest difference of a logit between batches of "
        + ", ".join(map(str, sizes)),
        "tolerance": f"Largest difference allowed{' of batches' if precision == 'int8' else ''}",
    }
    names = [*(name for name in named if name in figures), *(n for n in figures if n not in named)]
    yield "## Compared with PyTorch"
    yield (
        "ONNX Runtime computed validation photos with the file, and PyTorch the same arrays. The "
        f"file was written because {_ALLOWED[precision]}. Black, white and random images gave "
        "finite numbers."
    )
    yield facts(
        ("Figure", "Measured"),
        {named.get(n, n.replace("_", " ").capitalize()): _measured(n, figures[n]) for n in names}
        | {
            "Layers in float32": name_list(exported.kept_layers),
            "ONNX Runtime": code(onnxruntime.__version__),
        },
    )


def _measured(name: str, value: Any) -> str:
    if name in ("photos_missing", "ties") and not value:
        return ""
    if name in _SHARES:
        return f"{value:.2%}".replace(".00%", "%")
    return f"{value:.2g}" if isinstance(value, float) else shown(value)


def contract(card: Card) -> Iterator[str]:
    about, many = card.exported.metadata, len(card.classes)
    side, resize = about.preprocess.crop, about.preprocess.resize
    yield "## Input and output"
    yield facts(
        ("Tensor", "Content"),
        {
            f"input {code(INPUT)}": f"uint8 [N, {side}, {side}, 3]: RGB photos, 0 to 255, any "
            "number N at once; normalised inside",
            f"output {code(OUTPUTS[0])}": f"float32 [N, {many}], in the order of the classes",
            f"output {code(OUTPUTS[1])}": f"float32 [N, {many}], the softmax of the logits",
        },
    )
    yield (
        "A photo is turned upright (EXIF), made RGB (transparency over white), resized "
        f"({about.preprocess.interpolation}) so that its shorter side has {resize} pixels, and "
        f"cropped to the {side} x {side} in the middle. The file's metadata hold this, the classes "
        "in their order and the figures of the comparison, as JSON."
    )


def use(card: Card) -> Iterator[str]:
    preprocess, model = card.exported.metadata.preprocess, card.exported.path.name
    plain = _WITHOUT_THAW.format(
        model=model,
        input=INPUT,
        outputs=json.dumps(OUTPUTS),
        resize=preprocess.resize,
        crop=preprocess.crop,
        interpolation=preprocess.interpolation.upper(),
    )
    yield "## Use"
    yield "With Thaw, without PyTorch:"
    yield f"```sh\npython -m export.infer {shlex.quote(inert(model))} PHOTOS... --top 3\n```"
    yield f"```python\n{_WITH_THAW.format(model=model)}\n```"
    yield "Without Thaw (numpy, onnxruntime, Pillow):"
    yield f"```python\n{plain}\n```"
    yield (
        "Thaw decodes large JPEGs at a reduced size, so what it says of them can differ in the "
        "last digits."
    )


_WITH_THAW: Final = """\
from pathlib import Path

from export.classifier import Classifier

classifier = Classifier.load(Path({model!r}))
for result in classifier.classify(sorted(Path("PHOTOS").glob("*.jpg"))):
    print(result.photo, result.error or result.top[0])"""
_WITHOUT_THAW: Final = """\
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

model = onnxruntime.InferenceSession({model!r}, providers=["CPUExecutionProvider"])
classes = json.loads(model.get_modelmeta().custom_metadata_map["classes"])
photo = ImageOps.exif_transpose(Image.open("PHOTO.jpg")).convert("RGB")
scale = {resize} / min(photo.size)
size = [max({resize}, round(side * scale)) for side in photo.size]
photo = photo.resize(size, Image.Resampling.{interpolation})
left, top = ((side - {crop}) // 2 for side in size)
photos = np.asarray(photo.crop((left, top, left + {crop}, top + {crop})))[None]
logits, probabilities = model.run({outputs}, {{"{input}": photos}})
best = probabilities[0].argmax()
print(classes[best], probabilities[0, best])"""


def files(card: Card) -> Iterator[str]:
    yield "## Files and licence"
    yield facts(
        ("File", "SHA-256"),
        {
            code(card.exported.path.name): code(card.exported.sha256),
            "its checkpoint": code(card.exported.metadata.checkpoint_sha256),
        },
    )
    yield (
        "Licence: not stated. Those of the photos and of the weights that it was trained from "
        "apply; Thaw does not know them."
    )
