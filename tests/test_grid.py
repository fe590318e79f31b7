"""From flags or a recipe to the members of a sweep."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.explorer_runs import write_run
from trainer.config import Augmentation, Config, Schedule
from trainer.grid import NOT_TRAINING, Plan, SweepError, plan
from trainer.recipe import parse
from trainer.run_writer import RunWriter
from trainer.runlog import Run, read_run
from trainer.schema import PhaseRecord, ThawError

ROOT = Path(__file__).resolve().parents[1]
OREGON = ("1e-10:20", "1e-8:20", "1e-6:20", "1e-4:20", "1e-6:all", "1e-8:10")


def write_parent(runs: Path, name: str = "trunk") -> Run:
    config = {"optimizer": "sgd", "lr": 0.01}
    writer = RunWriter.create(runs, name, {"config": config, "model": {"arch": "resnet18"}})
    writer.start_phase(PhaseRecord("transfer", 0, 25, ("fc",), 10))
    writer.close("done")
    return read_run(writer.path)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_parent(tmp_path_factory.mktemp("grid") / "runs")


def planned(parent: Run | None, *flags: str) -> Plan:
    return plan(parse(flags), parent)


def write_recipe(folder: Path, text: str, name: str = "r.toml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_needs_no_torch() -> None:
    code = "import sys; from trainer.recipe import parse; parse(['--lr', '1e-5']); "
    code += "print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


# --- the grid ---------------------------------------------------------------------------------


def test_the_grid_is_the_product_with_one_control_a_seed(parent: Run) -> None:
    flags = ("--lr", "1e-6", "1e-5", "--unfreeze", "20", "all", "--seed", "1", "0", "--epochs", "7")
    made = planned(parent, *flags)
    assert len(made.members) == 10
    trained = [(c.phase, c.lr, c.unfreeze, c.seed) for c in made.configs[:8]]
    values = itertools.product((1e-6, 1e-5), ("20", "all"), (0, 1))
    assert trained == [("finetune", *value) for value in values]
    assert [place.control for place in made.info.places] == [False] * 8 + [True] * 2
    controls = made.configs[8:]
    assert [(c.phase, c.lr, c.seed, c.epochs) for c in controls] == [
        ("transfer", None, 0, 7),
        ("transfer", None, 1, 7),
    ]
    assert {c.parent for c in made.configs} == {str(parent.path)}  # not in the runs folder
    assert {c.optimizer for c in controls} == {"sgd"}  # the parent's
    assert made.batch_groups == 2


def test_one_control_for_each_seed_and_augmentation(parent: Run) -> None:
    made = planned(parent, "--rotation", "0", "0.02", "--seed", "0", "1", "--lr", "1e-6", "1e-5")
    controls = [c for c, p in zip(made.configs, made.info.places, strict=True) if p.control]
    assert [(c.augmentation.rotation, c.seed) for c in controls] == [
        (0.0, 0),
        (0.0, 1),
        (0.02, 0),
        (0.02, 1),
    ]
    assert made.labels[-1] == "control, rotation 0.02, seed 1"
    assert made.info.places[-1].group == "control, rotation 0.02"
    assert made.batch_groups == 4


def test_labels_and_run_names_say_what_varies_and_nothing_else(parent: Run) -> None:
    made = planned(parent, "--lr", "1e-6", "--schedule", "step", "constant", "--seed", "0", "1")
    assert made.labels[:4] == (
        "constant, seed 0",
        "constant, seed 1",
        "step, seed 0",
        "step, seed 1",
    )
    assert [place.group for place in made.info.places[1:3]] == ["constant", "step"]
    assert [config.run_name for config in made.configs[2:]] == [
        "finetune-20-lr1e-06-step-seed0",
        "finetune-20-lr1e-06-step-seed1",
        "control-seed0",
        "control-seed1",
    ]
    (only, control) = planned(parent, "--run-name", "mine").members
    assert (only[0], only[1].run_name) == ("lr 1e-05, 20 layers", "mine-finetune-20-lr1e-05")
    assert (control[0], control[1].run_name) == ("control", "mine-control")


@pytest.mark.parametrize("seed", range(20))
def test_labels_tell_members_apart(parent: Run, seed: int) -> None:
    """Also rates that print alike with six digits."""
    draw = random.Random(seed)
    rates = [str(1e-5 * (1 + draw.randrange(-3, 4) * 1e-9)) for _ in range(3)]
    flags = ["--lr", *dict.fromkeys(rates), "--unfreeze", "1", "all", "features.7"]
    flags += ["--crop-from", "off", "235", "--schedule", "constant", "exponential", "step"]
    flags += ["--decay", "0.3", "0.5", "--epochs-drop", "5", "10", "--noise", "0", "0.6"]
    made = planned(parent, *flags, "--seed", "0", "1")
    assert len(set(made.labels)) == len(made.members)
    assert len({config.run_name for config in made.configs}) == len(made.members)
    groups = {
        (place.group, c.seed) for place, c in zip(made.info.places, made.configs, strict=True)
    }
    assert len(groups) == len(made.members)


def test_a_schedule_is_combined_with_what_it_uses_only(parent: Run) -> None:
    flags = ("--schedule", "constant", "exponential", "step", "--decay", "0.3", "0.5", "0.7")
    made = planned(parent, *flags, "--drop", "0.5", "0.1", "--lr", "1e-8")
    assert made.labels == (
        "constant",
        "exponential, decay 0.3",
        "exponential, decay 0.5",
        "exponential, decay 0.7",
        "step, drop 0.1",
        "step, drop 0.5",
        "control",
    )


def test_the_labs_pairs_with_seeds(parent: Run) -> None:
    made = planned(parent, "--pairs", *OREGON, "--seed", "0", "1", "--epochs", "20")
    assert len(made.members) == 6 * 2 + 2
    assert made.info.places[0].group == "lr 1e-10, 20 layers"
    found = {(c.lr, c.unfreeze) for c in made.configs[:12]}
    assert found == {
        (1e-10, "20"),
        (1e-8, "20"),
        (1e-6, "20"),
        (1e-4, "20"),
        (1e-6, "all"),
        (1e-8, "10"),
    }


def test_a_transfer_sweep_has_no_control() -> None:
    rates = [f"{10**-k:g}" for k in range(1, 5)]
    made = planned(None, "--phase", "transfer", "--lr", *rates, "--data", "photos")
    assert made.labels == ("lr 0.0001", "lr 0.001", "lr 0.01", "lr 0.1")
    assert {config.phase for config in made.configs} == {"transfer"}
    assert made.configs[0].run_name == "transfer-lr0.0001"


def test_a_parent_elsewhere_is_named_by_its_path(tmp_path: Path, parent: Run) -> None:
    inside = planned(parent, "--runs-dir", str(parent.path.parent))
    outside = planned(parent, "--runs-dir", str(tmp_path))
    assert inside.configs[0].parent == parent.run_id
    assert outside.configs[0].parent == str(parent.path)
    assert inside.id == outside.id


def test_what_a_run_says_about_its_sweep(parent: Run) -> None:
    made = planned(parent, "--lr", "1e-6", "1e-5", "--seed", "0", "1")
    assert made.info.entry(1) == {
        "id": made.id,
        "name": f"sweep-{made.id[:6]}",
        "member": 2,
        "of": 6,
        "group": "lr 1e-06",
        "control": False,
        "key": made.info.places[1].key,
    }
    part = made.only([1, 4])
    assert [part.info.entry(i)["member"] for i in (0, 1)] == [2, 5]
    assert part.info.entry(1)["control"]
    assert part.configs == (made.configs[1], made.configs[4])
    assert part.id == made.id


def test_after_a_finetune_run_the_control_keeps_the_last_rate(tmp_path: Path) -> None:
    """There is no transfer phase whose schedule could go on."""
    run = write_run(tmp_path, "f", (0.5, 0.6), "finetune", parent_run_id="trunk")
    member, control = planned(read_run(run.path), "--runs-dir", str(tmp_path)).configs
    assert (member.lr, control.lr) == (1e-5, 1e-3)


# --- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--phase scratch", "--phase scratch: a sweep is of finetune or of transfer"),
        ("--phase transfer --from x", "--from belongs to a sweep of --phase finetune"),
        ("--phase transfer --unfreeze 10 20", "--unfreeze belongs to"),
        ("--phase transfer --pairs 1e-6:20", "--pairs belongs to"),
        ("--lr 1e-5 0.00001", "--lr 1e-05: is there twice"),
        ("--unfreeze 20 20", "--unfreeze 20: is there twice"),
        ("--pairs 1e-6:20 1e-06:20", "--pairs 1e-06:20: is there twice"),
        ("--pairs 1e-6:20 --lr 1e-5", "leave --lr and --unfreeze away"),
        ("--decay 0.3 0.5", "--decay takes several values that no member uses"),
        ("--schedule step --decay 0.3 0.5", "Give --schedule exponential"),
        ("--epochs-drop 5 10 --schedule cosine", "--epochs-drop takes several values"),
        ("--lr 1e-5 -1", "--lr -1.0: must be above zero"),
        ("--schedule step poly", "--schedule poly: choose one of"),
        ("--seed -3 4", "--seed -3: must be zero or more"),
        ("--lr 1e-5 --rotation 0.02 0.9", "--rotation 0.9"),
    ],
)
def test_mistakes_name_the_flag_and_the_remedy(flags: str, message: str) -> None:
    with pytest.raises(ThawError) as caught:
        parse(flags.split())
    assert message in str(caught.value)


def test_too_many_members_are_refused_before_they_are_made() -> None:
    seeds = [str(seed) for seed in range(900)]
    noise = [str(value) for value in range(1000)]
    with pytest.raises(SweepError, match=r"900000 combinations \(1000 x 900\), at most 1000"):
        parse(["--seed", *seeds, "--noise", *noise])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--pairs 1e-6", "1e-6: must be LR:LAYERS, such as 1e-6:20"),
        ("--pairs x:20", "must be LR:LAYERS"),
        ("--pairs 1e-6:", "must be LR:LAYERS"),
        ("--crop-from big", "big: must be a number of pixels, or off"),
        ("--batch-size 8 16", "16: is no recipe (FILE.toml), and the flag before it"),
    ],
)
def test_values_that_cannot_be_read(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse([*flags.split(), "--epochs", "2"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# --- recipes ----------------------------------------------------------------------------------


def test_a_recipe_is_the_same_as_its_flags(tmp_path: Path, parent: Run) -> None:
    recipe = write_recipe(
        tmp_path,
        """
        [sweep]
        name = "Oregon"
        pairs = ["1e-10:20", "1e-6:all"]
        seed = [0, 1]
        epochs = 20
        batch_size = 64
        early-stop = 5
        head = "512,256"
        contrast = 2.0
        crop-from = ["off", 235]
        schedule = "exponential"
        decay = [0.3, 0.5]
        no-cache = true
        strict = false
        """,
    )
    flags = "--pairs 1e-10:20 1e-6:all --seed 0 1 --epochs 20 --batch-size 64 --early-stop 5 "
    flags += "--head 512,256 --contrast 2 --crop-from off 235 --schedule exponential "
    flags += "--decay 0.3 0.5 --no-cache"
    made, same = planned(parent, recipe), planned(parent, *flags.split())
    assert made.members == same.members
    assert (made.id, made.name) == (same.id, "Oregon")
    assert not made.configs[0].cache


def test_flags_win_over_the_recipe(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "[sweep]\nlr = [1e-6, 1e-5]\nepochs = 3\nseed = 4", "food.toml")
    request = parse([recipe, "--lr", "1e-4", "--epochs", "9"])
    assert [(c.lr, c.epochs, c.seed) for c in request.members] == [(1e-4, 9, 4)]
    assert request.name == "food"
    assert parse(["--epochs", "9", recipe]).members[0].epochs == 9
    pairs = parse([recipe, "--pairs", "1e-3:all"])
    assert [(c.lr, c.unfreeze) for c in pairs.members] == [(1e-3, "all")]
    recipe = write_recipe(tmp_path, '[sweep]\npairs = ["1e-6:20"]')
    assert [(c.lr, c.unfreeze) for c in parse([recipe, "--lr", "1"]).members] == [(1.0, "20")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sweep]\nlrs = [1]", "lrs is no setting of a sweep. Did you mean lr?"),
        ("[sweep]\ndry-run = true", "dry-run is no setting"),
        ("[sweep]\nlr = []", "lr = []: an empty list gives no member"),
        ("[sweep]\nlr = [1e-5, 1e-5]", "--lr 1e-05: is there twice"),
        ("[sweep]\nlr = ['fast']", "must be a number"),
        ("[sweep]\nseed = 1.5", "seed = 1.5: must be a whole number"),
        ("[sweep]\nseed = true", "must be a text or a number"),
        ("[sweep]\nlr = [[1]]", "must be a text or a number"),
        ("[sweep]\nepochs = [1, 2]", "takes one value, and a sweep does not vary it"),
        ("[sweep]\nstrict = 'yes'", "must be true or false"),
        ("[sweep]\nname = 3", "must be a text"),
        ("[sweep]\nhead = 'big'", "big: must be linear or sizes such as 512,256"),
        ("[sweep]\npairs = ['1e-6']", "must be LR:LAYERS"),
        ("[sweep]\nepochs-drop = 5\nepochs_drop = 6", "is there twice, with - and with _"),
        ("[sweep]\npairs = ['1:all']\nlr = 1", "leave --lr and --unfreeze away"),
        ("lr = 1", "must hold one table, [sweep]; it holds lr"),
        ("[sweep]\n[other]", "it holds other"),
        ("sweep = 3", "must hold one table, [sweep]"),
        ("[sweep", "is not valid TOML"),
    ],
)
def test_mistakes_in_a_recipe(tmp_path: Path, text: str, message: str) -> None:
    recipe = write_recipe(tmp_path, text)
    with pytest.raises(SweepError) as caught:
        parse([recipe])
    assert message in str(caught.value)


def test_a_recipe_that_is_not_there_or_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="No such file"):
        parse([str(tmp_path / "none.toml")])
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SweepError, match="not valid TOML"):
        parse([str(tmp_path / "b.toml")])


# --- the id -----------------------------------------------------------------------------------

# For each setting that changes training, flags that change it; None where a sweep cannot.
CHANGES: dict[str, str | None] = {
    "phase": None,
    "parent": None,  # by the run it resolves to, below
    "transfer_epochs": None,  # of the parent, which has been trained by then
    "transfer_lr": None,
    "schedule": "--schedule step",
    "augmentation": "--noise 1",
    "data": "--data elsewhere",
    "split_file": "--split-file split.csv",
    "group_by": "--group-by track",
    "exclude_file": "--exclude-file excluded.txt",
    "split_seed": "--split-seed 1",
    "val_fraction": "--val-fraction 0.5",
    "limit": "--limit 5",
    "strict": "--strict",
    "arch": "--arch resnet18",
    "weights": "--weights none",
    "head": "--head 8",
    "pool": "--pool max",
    "size": "--size 64",
    "outputs": "--outputs 1000",
    "epochs": "--epochs 11",
    "batch_size": "--batch-size 8",
    "lr": "--lr 1e-4",
    "optimizer": "--optimizer adamw",
    "unfreeze": "--unfreeze 10",
    "seed": "--seed 1",
    "early_stop": "--early-stop 2",
    "views": "--views 4",
    "precision": "--precision bf16",
    "label_smoothing": "--label-smoothing 0.1",
    "class_weights": "--class-weights balanced",
    "layer_decay": "--layer-decay 0.75",
    "gradual": "--gradual all@5",
}
NESTED = {
    "name": "--schedule cosine",
    "decay": "--schedule exponential --decay 0.4",
    "drop": "--schedule step --drop 0.4",
    "epochs_drop": "--schedule step --epochs-drop 4",
    "warmup": "--warmup 1",
    "brightness": "--brightness 0.3",
    "contrast": "--contrast 2",
    "color": "--color fixed",
    "rotation": "--rotation 0.02",
    "crop_from": "--crop-from 235",
    "noise": "--noise 0.6",
}


def test_every_setting_is_either_training_or_not() -> None:
    """A new setting fails here until someone decides whether it makes another sweep."""
    known = set(CHANGES) | set(NOT_TRAINING)
    assert set(Config.__dataclass_fields__) <= known
    assert set(Schedule.__dataclass_fields__) | set(Augmentation.__dataclass_fields__) <= set(
        NESTED
    )


def test_any_setting_that_changes_training_changes_the_id(parent: Run) -> None:
    flags = [*CHANGES.values(), *NESTED.values(), "--lr 1e-5 1e-4", "--seed 0 1", "--pairs 1e-5:9"]
    ids = [planned(parent, *given.split()).id for given in flags if given]
    ids.append(planned(parent).id)
    assert len(set(ids)) == len(ids)
    assert planned(write_parent(parent.path.parent), "--epochs", "10").id not in ids


def test_what_does_not_change_training_leaves_the_id(parent: Run, tmp_path: Path) -> None:
    same = planned(parent).id
    for flags in (
        "--device cpu",
        "--track mlflow",
        "--no-cache",
        f"--cache-dir {tmp_path}",
        f"--runs-dir {tmp_path}",
        "--run-name other",
        "--lr 1e-5 --unfreeze 20",  # the defaults
        "--views auto",  # exact, with advice
        "--decay 0.9",  # which a constant rate does not use
        "--pairs 1e-5:20",
        "--transfer-epochs 3",  # of a parent that is there
    ):
        assert planned(parent, *flags.split()).id == same, flags


def test_the_same_folder_written_otherwise_is_the_same_sweep(
    parent: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    relative = planned(parent, "--data", "photos", "--weights", "w.pth")
    absolute = planned(
        parent, "--data", str(tmp_path / "photos"), "--weights", str(tmp_path / "w.pth")
    )
    assert relative.id == absolute.id


@pytest.mark.parametrize("seed", range(30))
def test_the_order_of_flags_and_values_changes_nothing(parent: Run, seed: int) -> None:
    draw = random.Random(seed)
    groups = [
        ("--lr", ["1e-8", "1e-6", "1e-4"]),
        ("--unfreeze", ["10", "20", "all", "features.7"]),
        ("--schedule", ["constant", "cosine"]),
        ("--seed", ["0", "1"]),
        ("--rotation", ["0", "0.02"]),
        ("--epochs", ["5"]),
    ]
    first = planned(parent, *itertools.chain(*((flag, *values) for flag, values in groups)))
    draw.shuffle(groups)
    shuffled = [(flag, *draw.sample(values, len(values))) for flag, values in groups]
    again = planned(parent, *itertools.chain(*shuffled))
    assert again.id == first.id
    assert again.members == first.members
