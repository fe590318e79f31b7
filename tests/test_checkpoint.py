"""Checkpoints load as they were written or not at all."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import pytest
import torch

from trainer.checkpoint import Checkpoint, CheckpointError, load_model, save_checkpoint
from trainer.model import ModelSpec, build_model
from trainer.schema import Preprocess

SPEC = ModelSpec("squeezenet1_1", 3)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    network = build_model(SPEC)
    path = tmp_path / "transfer-best.pt"
    save_checkpoint(
        path, Checkpoint(SPEC, ("a", "b", "c"), Preprocess(), "transfer", 4, network.state_dict())
    )
    return path


def test_round_trip(saved: Path) -> None:
    network, checkpoint = load_model(saved)
    assert (checkpoint.spec, checkpoint.classes, checkpoint.epoch) == (SPEC, ("a", "b", "c"), 4)
    assert checkpoint.preprocess == Preprocess()
    assert not network.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, checkpoint.state_dict[name])


def test_the_hash_file_is_sha256sums_format(saved: Path) -> None:
    digest = hashlib.sha256(saved.read_bytes()).hexdigest()
    listed = saved.with_name("transfer-best.pt.sha256").read_text()
    assert listed == f"{digest}  transfer-best.pt\n"


@pytest.mark.parametrize("position", [100, 50_000, -100])
def test_a_flipped_byte_is_refused(saved: Path, position: int) -> None:
    content = bytearray(saved.read_bytes())
    content[position] ^= 1
    saved.write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256 does not match"):
        load_model(saved)


def test_missing_files_are_refused(saved: Path) -> None:
    saved.with_name(f"{saved.name}.sha256").unlink()
    with pytest.raises(CheckpointError, match="sha256 file is missing"):
        load_model(saved)
    with pytest.raises(CheckpointError, match="No such file"):
        load_model(saved.with_name("none.pt"))


def with_hash(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    path.with_name(f"{path.name}.sha256").write_text(f"{digest}  {path.name}\n")
    return path


def test_a_pickle_payload_never_runs(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    path = with_hash(tmp_path / "evil.pt", pickle.dumps(Payload()))
    with pytest.raises(CheckpointError, match="not a checkpoint of Thaw"):
        load_model(path)
    assert not (tmp_path / "ran").exists()


def test_foreign_content_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, tmp_path / "x.pt")
    path = with_hash(tmp_path / "y.pt", (tmp_path / "x.pt").read_bytes())
    with pytest.raises(CheckpointError, match="not a checkpoint of Thaw"):
        load_model(path)


def test_a_crash_between_hash_and_content_leaves_a_loadable_checkpoint(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trainer.checkpoint as module

    real = module.write_atomically

    def crash(path: Path, content: bytes) -> None:
        if path.suffix == ".pt":
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(module, "write_atomically", crash)
    with pytest.raises(KeyboardInterrupt):
        _network, checkpoint = load_model(saved)
        changed = {name: tensor + 1 for name, tensor in checkpoint.state_dict.items()}
        save_checkpoint(
            saved, Checkpoint(SPEC, ("a", "b", "c"), Preprocess(), "transfer", 5, changed)
        )
    assert load_model(saved)[1].epoch == 4
