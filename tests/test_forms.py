"""The fastest form is chosen among those that compute the same, and chosen alike the next time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import fx

import trainer.forms
from trainer.forms import TOLERANCE, choose_form
from trainer.model import ModelSpec, build_model, unfreeze
from trainer.prefix import Trace

MANY = 10**6


@pytest.fixture(scope="module")
def prefix() -> fx.GraphModule:
    network = build_model(ModelSpec("mobilenet_v3_small", 3)).eval()
    unfreeze(network, "8")
    traced = Trace(network, torch.rand(3, 3, 224, 224))
    cut = traced.cut()
    assert cut is not None
    return traced.part(None, cut)


PHOTOS = torch.rand(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", ["folded", "onnxruntime"])
def test_every_form_gives_what_the_network_gives(
    prefix: fx.GraphModule, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.forms, "_fastest", lambda trials: form)
    chosen = choose_form(prefix, PHOTOS, MANY, None)
    assert chosen.name == form
    for count in (1, 4):
        with torch.inference_mode():
            (expected,), (found,) = prefix(PHOTOS[:count]), chosen.run(PHOTOS[:count])
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()


def test_folding_leaves_the_network_itself_alone(prefix: fx.GraphModule) -> None:
    before = {name: value.clone() for name, value in prefix.state_dict().items()}
    choose_form(prefix, PHOTOS, 1, None)
    assert all(torch.equal(value, before[name]) for name, value in prefix.state_dict().items())


@pytest.mark.slow
def test_the_outcome_of_a_trial_is_remembered(
    prefix: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = tmp_path / "cache" / "calibration.json"
    first = choose_form(prefix, PHOTOS, MANY, memory)
    assert {trial.form for trial in first.trials} == {"folded", "onnxruntime"}
    assert all(trial.images_per_second for trial in first.trials)
    monkeypatch.setattr(trainer.forms, "_timed", _never)
    again = choose_form(prefix, PHOTOS, MANY, memory)
    assert (again.name, again.trials) == (first.name, first.trials)
    with pytest.raises(AssertionError, match="tried"):  # other shapes are other work
        choose_form(prefix, PHOTOS[:2], MANY, memory)
    memory.write_text("{torn")
    with pytest.raises(AssertionError, match="tried"):
        choose_form(prefix, PHOTOS, MANY, memory)


def _never(*_: object) -> None:
    raise AssertionError("tried again")


def test_little_work_is_not_worth_a_trial(prefix: fx.GraphModule, tmp_path: Path) -> None:
    chosen = choose_form(prefix, PHOTOS, 100, tmp_path / "calibration.json")
    assert [trial.form for trial in chosen.trials] == ["folded"]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_bfloat16_is_for_those_who_ask(
    prefix: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = tmp_path / "calibration.json"
    exact = choose_form(prefix, PHOTOS, MANY, memory)
    assert "bfloat16" not in {trial.form for trial in exact.trials}
    asked = choose_form(prefix, PHOTOS, MANY, memory, "bf16")
    difference = {trial.form: trial.difference for trial in asked.trials}["bfloat16"]
    assert difference is not None
    assert TOLERANCE < difference < 0.1
    monkeypatch.setattr(trainer.forms, "_fastest", lambda trials: "bfloat16")
    with torch.inference_mode():
        (value,) = choose_form(prefix, PHOTOS, MANY, memory, "bf16").run(PHOTOS)
    assert value.dtype == torch.float32


def test_a_form_that_is_wrong_or_broken_is_not_used(
    prefix: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(module: fx.GraphModule, photos: torch.Tensor) -> trainer.forms.Run:
        return lambda batch: tuple(value * 1.01 for value in module(batch))

    def broken(module: fx.GraphModule, photos: torch.Tensor) -> trainer.forms.Run:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(trainer.forms, "_BUILD", {"folded": wrong, "onnxruntime": broken})
    chosen = choose_form(prefix, PHOTOS, MANY, None)
    assert chosen.name == "plain"
    problems = {trial.form: trial.problem for trial in chosen.trials}
    assert problems == {
        "folded": "differs from the plain network",
        "onnxruntime": "RuntimeError: no compiler here",
    }
    assert json.dumps(chosen.to_dict())
