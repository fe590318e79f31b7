"""Classifying uploads: the networks, what is told of many photos, and the page."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from streamlit.testing.v1 import AppTest

from explorer.classify import (
    Classifier,
    Exported,
    Guess,
    Name,
    Network,
    Prediction,
    slots,
    thumbnail,
)
from explorer.desk import Desk, Ready, Row, Upload, _batches, agreement, changes, difference, to_csv
from explorer.gradcam import GradCam, GradCamError, Heat, overlay
from tests.explorer_runs import TRUNK_ACCURACY, write_finetune, write_run, write_trunk
from trainer.checkpoint import Checkpoint, save_checkpoint
from trainer.model import ModelSpec, build_model
from trainer.preprocess import MAX_PIXELS
from trainer.runlog import Run, read_run
from trainer.schema import Preprocess

SMALL = Preprocess(resize=72, crop=64)
CLASSES = ("**rose**", "<i>daisy</i>", "=1+1")


def photo_bytes(colour: str = "red", size: tuple[int, int] = (100, 80)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def save_network(path: Path, favourite: int, arch: str = "mobilenet_v3_small") -> None:
    """A checkpoint with random weights that leans towards one class."""
    torch.manual_seed(0)
    spec = ModelSpec(arch, len(CLASSES))
    weights = build_model(spec).state_dict()
    bias = [name for name in weights if name.endswith("bias")][-1]
    weights[bias] = torch.zeros(len(CLASSES))
    weights[bias][favourite] = 3.0
    save_checkpoint(path, Checkpoint(spec, CLASSES, SMALL, "transfer", 3, weights))


def write_pair(runs: Path) -> Run:
    """A finetune run and its trunk, with checkpoints: before says class 0, after class 1."""
    trunk = write_run(runs, "trunk", TRUNK_ACCURACY, classes=list(CLASSES))
    save_network(trunk.path / "checkpoints" / "transfer-last.pt", favourite=0)
    child = write_run(
        runs,
        "child",
        [0.70, 0.74],
        "finetune",
        3,
        parent_run_id=trunk.run_id,
        parent_checkpoint={"file": "transfer-last.pt"},
        classes=list(CLASSES),
    )
    save_network(child.path / "checkpoints" / "finetune-best.pt", favourite=1)
    return read_run(child.path)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THAW_RUNS_DIR", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["streamlit_app.py"])
    return tmp_path


# --- networks -----------------------------------------------------------------------------------


def test_slots(tmp_path: Path) -> None:
    trunk = write_trunk(tmp_path)
    [only] = slots(read_run(tmp_path / trunk))
    assert (only.which, only.path) == ("after", None)
    assert "is not there" in only.reason
    (tmp_path / trunk / "checkpoints" / "transfer-best.pt").touch()
    assert slots(read_run(tmp_path / trunk))[0].path is not None
    child = write_finetune(tmp_path, trunk, "child", [0.7, 0.8])
    assert [slot.which for slot in slots(read_run(child.path))] == ["before", "after"]


def test_a_checkpoint_classifies(tmp_path: Path) -> None:
    """The real thing, with random weights: probabilities of the classes, best first."""
    save_network(tmp_path / "transfer-best.pt", favourite=2)
    network = Classifier(tmp_path / "transfer-best.pt")
    first, second = network.predict([Image.new("RGB", (100, 60), c) for c in ("green", "blue")])
    assert isinstance(first, Prediction)
    assert isinstance(second, Prediction)
    chances = [guess.probability for guess in first.guesses]
    assert chances == sorted(chances, reverse=True)
    assert first.label == CLASSES[2]
    assert first.probabilities.sum() == pytest.approx(1, abs=1e-5)
    assert first.probabilities[2] == pytest.approx(chances[0])
    assert first.seconds == second.seconds > 0


def test_the_exported_network_answers_as_its_checkpoint(exported: Run) -> None:
    [slot] = slots(exported)
    assert slot.path
    assert exported.onnx
    before, after = Classifier(slot.path), Exported(exported.onnx)
    images = [Image.new("RGB", (90, 70), colour) for colour in ("red", "green", "blue")]
    for one, other in zip(before.predict(images), after.predict(images), strict=True):
        assert isinstance(one, Prediction)
        assert isinstance(other, Prediction)
        assert one.label == other.label
        row = Row(Upload("", "", b""), {"after": one, "onnx": other})
        gap = difference(row)
        assert gap is not None
        assert gap < 1e-5
    assert after.engine == "CPUExecutionProvider"
    assert after.outdated(before.sha256) == ""
    assert f"epoch 3 of run {exported.run_id}" in after.outdated("another")


class Fixed(Network):
    """A network that gives the same probabilities for every photo."""

    def __init__(self, *probabilities: float) -> None:
        super().__init__(CLASSES, SMALL, "by hand")
        self.row = np.array(probabilities, np.float32)
        self.batches: list[int] = []

    def _probabilities(self, images: object) -> np.ndarray:
        assert isinstance(images, list)
        self.batches.append(len(images))
        if self.row.size == 0:
            raise RuntimeError("not enough memory")
        return np.tile(self.row, (len(images), 1))


def test_a_network_that_fails_says_why_instead_of_an_answer() -> None:
    image = Image.new("RGB", (9, 9))
    assert Fixed().predict([image, image]) == ["the network failed: not enough memory"] * 2
    [answer] = Fixed(np.nan, 0, 0).predict([image])
    assert answer == "the network gives no finite probabilities for it"


def test_the_time_does_not_hold_the_first_pass() -> None:
    network = Fixed(1, 0, 0)
    network.predict([Image.new("RGB", (9, 9))] * 3)
    network.predict([Image.new("RGB", (9, 9))] * 3)
    assert network.batches == [3, 3, 3]  # the first of them untimed


# --- many photos --------------------------------------------------------------------------------


def prediction(label: str, probability: float = 0.75, seconds: float = 0.0125) -> Prediction:
    guesses = (Guess(label, probability), Guess("other", 1 - probability))
    return Prediction(guesses, seconds, (label, "other"), np.array([probability, 1 - probability]))


def row(name: str, **labels: str) -> Row:
    names: dict[str, Name] = {"before": "before", "after": "after", "onnx": "onnx"}
    return Row(Upload(name, name, b""), {names[n]: prediction(x) for n, x in labels.items()})


def test_agreement() -> None:
    rose, daisy = prediction("rose"), prediction("daisy")
    assert agreement([rose]) == ""
    assert agreement([rose, rose]) == "same answer"
    assert agreement([rose, rose, daisy]) == "answers differ"


def test_changes_are_counted_most_first() -> None:
    rows = [
        row("a", before="rose", after="daisy"),
        row("b", before="daisy", after="rose"),
        row("c", before="rose", after="daisy"),
        row("d", before="rose", after="rose"),
        row("e", after="rose", onnx="daisy"),
        Row(Upload("f", "f", b""), error="not an image"),
    ]
    assert changes(rows) == [("rose", "daisy", 2), ("daisy", "rose", 1)]


def test_probabilities_of_different_classes_are_not_compared() -> None:
    assert difference(row("a", after="rose", onnx="rose")) == 0
    assert difference(row("a", after="rose", onnx="daisy")) is None
    assert difference(row("a", after="rose")) is None


def test_the_csv_holds_everything_and_cannot_act() -> None:
    rows = [
        row("=HYPERLINK(1).jpg", before="+rose", after="rose, red"),
        Row(Upload("b", "a\n\x1b[2J.jpg", b""), error="-1 is no size"),
        Row(Upload("c", "c.jpg", b""), {"before": prediction("x"), "after": "it failed"}),
    ]
    content = to_csv(rows, ["before", "after"]).decode()
    assert content.count("\n") == 4
    first, second, third = csv.DictReader(io.StringIO(content))
    assert first == {
        "file": "'=HYPERLINK(1).jpg",
        "before_class": "'+rose",
        "before_probability": "0.750000",
        "before_milliseconds": "12.5",
        "after_class": "rose, red",
        "after_probability": "0.750000",
        "after_milliseconds": "12.5",
        "agreement": "answers differ",
        "error": "",
    }
    assert second["file"] == r"a\n\x1b[2J.jpg"
    assert second["error"] == "'-1 is no size"
    assert second["before_class"] == second["after_class"] == second["agreement"] == ""
    assert (third["before_class"], third["error"]) == ("x", "after: it failed")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_no_cell_is_a_formula(start: str) -> None:
    content = to_csv([row(f"{start}1+1", before=f"{start}2+2")], ["before"])
    [cells] = csv.DictReader(io.StringIO(content.decode()))
    assert cells["file"].startswith("'")
    assert cells["before_class"].startswith("'")


def uploads(count: int) -> list[Upload]:
    return [Upload(f"{n}", f"{n}.png", photo_bytes()) for n in range(count)]


def test_many_photos_are_classified_in_batches_and_once() -> None:
    network, desk = Fixed(0.2, 0.8, 0), Desk()
    ready = [Ready("before", "Before", network, "stamp")]
    photos = [*uploads(40), Upload("bad", "bad.png", b"no photo")]
    assert list(desk.work(photos, ready)) == [(0, 41), (16, 41), (32, 41)]
    rows = [desk.row(photo, ready) for photo in photos]
    assert {one.predictions["before"].label for one in rows[:40]} == {CLASSES[1]}
    assert Image.open(io.BytesIO(rows[0].picture)).format == "JPEG"
    assert rows[40].error.startswith("not an image")
    assert rows[40].answers == {}
    assert list(desk.work(photos, ready)) == []
    # Another network: the photos that it has not seen, without those that cannot be read.
    both = [*ready, Ready("after", "After", Fixed(1, 0, 0), "other stamp")]
    assert list(desk.work(photos, both))[-1][1] == 40
    assert network.batches == [16, 16, 16, 8, 8]  # the first of each size is for warming up


def test_what_is_removed_is_forgotten() -> None:
    desk, ready = Desk(), [Ready("before", "Before", Fixed(1, 0, 0), "stamp")]
    photos = uploads(3)
    list(desk.work(photos, ready))
    list(desk.work(photos[:1], ready))
    assert list(desk.work(photos, ready)) == [(0, 2)]


def test_large_photos_are_not_decoded_all_at_once() -> None:
    side = int((MAX_PIXELS * 0.9) ** 0.5)
    large = io.BytesIO()
    Image.new("L", (side, side)).save(large, "JPEG")
    photos = [Upload(f"{n}", "large.jpg", large.getvalue()) for n in range(5)]
    sizes = [len(group) for group in _batches([*photos, *uploads(3)])]
    assert sizes == [2, 2, 4]


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000), (4000, 3000)])
def test_thumbnails_are_small_and_never_too_thin(size: tuple[int, int]) -> None:
    small = thumbnail(Image.new("RGB", size))
    assert max(small.size) <= 440
    assert min(small.size) >= 22


# --- Grad-CAM -----------------------------------------------------------------------------------


def network(arch: str = "resnet18", classes: int = 4) -> torch.nn.Module:
    torch.manual_seed(1)
    return build_model(ModelSpec(arch, classes)).eval()


def pixels(side: int = 96) -> torch.Tensor:
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(2))


def test_grad_cam_of_a_linear_head_is_the_weighted_feature_map() -> None:
    """Behind average pooling the gradient of a logit is the head's weight over the cells."""
    resnet = network()
    kept: list[torch.Tensor] = []
    hook = resnet.get_submodule("layer4").register_forward_hook(lambda *a: kept.append(a[2]))
    with torch.no_grad():
        resnet(pixels())
    hook.remove()
    weight = resnet.get_submodule("fc").get_parameter("weight").detach()[2]
    expected = torch.einsum("c,chw->hw", weight, kept[0][0]).clamp(min=0)
    heat = GradCam(resnet, 96).heat(pixels(), target=2)
    np.testing.assert_allclose(heat.cells, (expected / expected.max()).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "arch", ["efficientnet_b0", "squeezenet1_1", "alexnet", "shufflenet_v2_x0_5", "timm:resnet18"]
)
def test_the_feature_map_is_found_in_any_network(arch: str) -> None:
    cells = GradCam(network(arch), 96).heat(pixels(), target=0).cells
    assert min(cells.shape) > 1
    assert cells.min() >= 0
    assert cells.max() in (0, 1)


def test_a_network_without_a_feature_map_is_told() -> None:
    with pytest.raises(GradCamError, match="VisionTransformer has none"):
        GradCam(network("timm:vit_tiny_patch16_224"), 224)


def test_the_network_is_left_as_it_is() -> None:
    resnet = network().requires_grad_(False)
    before = resnet(pixels())
    GradCam(resnet, 96).heat(pixels(), target=1)
    assert torch.equal(resnet(pixels()), before)
    assert not any(weight.requires_grad for weight in resnet.parameters())
    for module in resnet.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_two_visitors_at_once_get_what_each_gets_alone() -> None:
    cam = GradCam(network(), 96)
    alone = [cam.heat(pixels(), target).cells for target in (0, 1)]
    found: dict[int, list[np.ndarray]] = {0: [], 1: []}

    def visit(target: int) -> None:
        for _ in range(8):
            found[target].append(cam.heat(pixels(), target).cells)

    threads = [threading.Thread(target=visit, args=(target,)) for target in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for target in (0, 1):
        assert len(found[target]) == 8
        for cells in found[target]:
            np.testing.assert_allclose(cells, alone[target], atol=1e-5)


def test_without_captum_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(GradCamError, match="pip install captum"):
        GradCam(network(), 96)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ((0, 0), "upper left"),
        ((3, 3), "middle"),
        ((3, 6), "middle right"),
        ((6, 3), "lower middle"),
    ],
)
def test_the_strongest_part_in_words(place: tuple[int, int], words: str) -> None:
    cells = np.zeros((7, 7), np.float32)
    assert Heat(cells).strongest == ""
    cells[place] = 1
    assert Heat(cells).strongest == words


def test_the_overlay_is_brightest_where_the_heat_is() -> None:
    cells = np.zeros((4, 4), np.float32)
    cells[0, 3] = 1
    picture = np.asarray(overlay(np.full((64, 64, 3), 128, np.uint8), Heat(cells)))
    assert picture.shape == (64, 64, 3)
    light = picture.sum(axis=2)
    assert light[2, 61] == light.max()
    assert light[61, 2] == light.min()


def test_importing_loads_neither_torch_nor_captum_nor_onnxruntime() -> None:
    code = (
        "import sys, explorer.classify, explorer.gradcam, explorer.pages.classify; "
        "print({'torch', 'captum', 'onnxruntime', 'matplotlib'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "set()"


# --- the page -----------------------------------------------------------------------------------


def _page() -> None:
    from explorer.pages import classify

    classify.page()


def page(**link: str) -> AppTest:
    app = AppTest.from_function(_page, default_timeout=60)
    for name, value in link.items():
        app.query_params[name] = value
    return app.run()


File = tuple[str, bytes, str]


def upload(app: AppTest, *files: tuple[str, bytes]) -> AppTest:
    named: list[File] = [(name, content, "image/png") for name, content in files]
    app.file_uploader(key="files").set_value(named).run()
    assert not app.exception
    return app


def html(app: AppTest) -> str:
    return "".join(block.value for block in app.html)


def texts(app: AppTest) -> list[str]:
    return [line.value for line in app.text]


def test_the_newest_unfrozen_run_comes_first(runs: Path) -> None:
    trunk = write_trunk(runs)
    child = write_finetune(runs, trunk, "child", [0.70, 0.74]).run_id
    write_trunk(runs, "later")
    app = page()
    assert not app.exception
    assert app.selectbox(key="run").value == child
    # No checkpoint was written: the reason is told, not raised.
    assert any("Before unfreezing:" in line for line in texts(app))
    assert any("After unfreezing:" in line for line in texts(app))
    assert any("never stored" in note.value for note in app.caption)
    upload(app, ("a.png", photo_bytes()))
    assert any("After unfreezing:" in line for line in texts(app))


def test_before_and_after_side_by_side(runs: Path) -> None:
    run = write_pair(runs)
    app = upload(page(), ("*a*.png", photo_bytes()), ("bad<b>.png", b"no photo"))
    shown = html(app)
    assert 'data-testid="answer">**rose**</div>' in shown
    assert 'data-testid="answer">&lt;i&gt;daisy&lt;/i&gt;</div>' in shown
    assert "answers differ" in shown
    assert "*a*.png" in shown
    assert "<td>bad&lt;b&gt;.png</td><td>not an image" in shown
    assert "Class changed by unfreezing: 1 photo" in shown
    assert "1 of 2 photos were read. Same answer on 0 of 1 photos." in texts(app)
    command = f"python -m export {run.run_id} --runs-dir {runs}"
    assert [block.value for block in app.code] == [command]


def test_the_way_to_the_export_page(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_pair(runs)
    opened: list[str] = []
    monkeypatch.setattr("streamlit.switch_page", lambda page, **_: opened.append(page.url_path))
    app = page()
    app.button(key="to-export").click().run()
    assert not app.exception
    assert opened == ["exporting"]
    assert app.session_state["run"] == run.run_id


def test_a_photo_whose_checkpoint_is_damaged(runs: Path) -> None:
    run = write_pair(runs)
    (run.path / "checkpoints" / "finetune-best.pt").write_bytes(b"torn")
    app = upload(page(), ("a.png", photo_bytes()))
    assert any(line.startswith("After unfreezing: The checkpoint") for line in texts(app))
    assert "**rose**" in html(app)
    assert "same answer" not in html(app)


def test_many_photos_are_shown_page_by_page(runs: Path) -> None:
    write_pair(runs)
    app = upload(page(), *[(f"{n:03d}.png", photo_bytes()) for n in range(23)])
    assert "000.png" in html(app)
    assert "010.png" not in html(app)
    [pages] = app.get("pagination")
    pages.set_value(3).run()
    assert not app.exception
    assert "022.png" in html(app)
    assert "000.png" not in html(app)
    app.segmented_control(key="answers").set_value("Answers differ").run()
    assert not app.exception
    linked = upload(page(photo_page="2"), *[(f"{n}.png", photo_bytes()) for n in range(13)])
    assert "12.png" in html(linked)
    beyond = upload(page(photo_page="9"), *[(f"{n}.png", photo_bytes()) for n in range(13)])
    assert "0.png" in html(beyond)


def test_grad_cam_on_demand(runs: Path) -> None:
    write_pair(runs)
    app = upload(page(), ("a.png", photo_bytes()))
    assert "Grad-CAM" not in html(app)
    pictures = len(app.get("image"))
    app.toggle(key="heat").set_value(True).run()
    assert not app.exception
    assert len(app.get("image")) == pictures + 2
    assert "**rose**: " in html(app)
    app.selectbox(key="heat_class").set_value("=1+1").run()
    assert not app.exception
    assert html(app).count("=1+1: ") == 2
    assert "heat_class" in app.query_params
    again = page(heat="true", heat_class="=1+1")
    assert again.selectbox(key="heat_class").value == "=1+1"
    gone = page(heat="true", heat_class="lily")
    assert gone.selectbox(key="heat_class").value == ""


def test_grad_cam_without_captum(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pair(runs)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    app = upload(page(heat="true"), ("a.png", photo_bytes()))
    assert any("pip install captum" in line for line in texts(app))
    assert "**rose**" in html(app)


@pytest.fixture
def with_onnx(runs: Path, exported: Run) -> Run:
    shutil.copytree(exported.path, runs / exported.run_id)
    return read_run(runs / exported.run_id)


def test_the_exported_network_is_the_last_column(with_onnx: Run) -> None:
    app = upload(page(), ("a.png", photo_bytes()), ("b.png", photo_bytes("blue")))
    assert html(app).count('data-testid="answer"') == 4
    assert "model.onnx, CPUExecutionProvider" in html(app)
    assert html(app).count("same answer") == 2
    assert "of PyTorch&#x27;s" in html(app)
    assert not app.code


def test_an_export_of_another_checkpoint_is_told(with_onnx: Run) -> None:
    path = with_onnx.path / "checkpoints" / "transfer-best.pt"
    spec = ModelSpec("squeezenet1_1", 3)
    weights = build_model(spec).state_dict()
    classes = with_onnx.classes
    save_checkpoint(path, Checkpoint(spec, classes, SMALL, "transfer", 4, weights))
    app = upload(page(), ("a.png", photo_bytes()))
    assert any(line.startswith("model.onnx is out of date: ") for line in texts(app))
    assert app.code[0].value.startswith("python -m export ")
    assert app.button(key="to-export")


def test_a_damaged_export_leaves_the_others(with_onnx: Run) -> None:
    assert with_onnx.onnx
    with_onnx.onnx.write_bytes(b"torn")
    app = upload(page(), ("a.png", photo_bytes()))
    assert any("is not a model that Thaw can use" in line for line in texts(app))
    assert html(app).count('data-testid="answer"') == 1
