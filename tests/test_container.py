"""The Dockerfile: linted, and each command in it that needs no container run outside one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.conftest import _free_port

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def words_of(instruction: str, target: str) -> list[str]:
    """The words of an instruction in its JSON form, in one target."""
    stage = DOCKERFILE.split(f"AS {target}\n")[1].split("\nFROM ")[0]
    (found,) = re.findall(rf"{instruction} (\[.*\])", stage)
    return json.loads(found)


def test_it_lints() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed (requirements-dev.txt)")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_cpu_image_asks_for_no_gpu_package(tmp_path: Path) -> None:
    (command,) = re.findall(r"(sed -i .*?requirements\.txt)", DOCKERFILE)
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    lines = (tmp_path / "requirements.txt").read_text().splitlines()
    assert not [line for line in lines if re.match(r"onnxruntime-gpu|.*\[cuda", line)]
    assert sum(line.startswith("onnxruntime>=") for line in lines) == 2


def test_the_trainer_says_how_it_is_used() -> None:
    python, *words = [*words_of("ENTRYPOINT", "trainer"), *words_of("CMD", "trainer")]
    assert python == "python"
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--phase" in done.stdout


@pytest.fixture
def app(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    streamlit, *words = words_of("ENTRYPOINT", "app")
    assert streamlit == "streamlit"
    port = _free_port()
    command = [sys.executable, "-m", "streamlit", *words, "--server.port", str(port)]
    environment = os.environ | {"THAW_RUNS_DIR": str(tmp_path)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process, port
        process.terminate()


@pytest.mark.slow
def test_the_app_is_healthy(app: tuple[subprocess.Popen[str], int]) -> None:
    process, port = app
    (python, option, code) = words_of("HEALTHCHECK[^\\[]*CMD", "app")
    assert (python, option) == ("python", "-c")
    command = [sys.executable, "-c", code.replace("8501", str(port))]
    for _ in range(60):
        if subprocess.run(command, capture_output=True).returncode == 0:
            break
        time.sleep(0.5)
    else:
        pytest.fail("the health check never passed")
    process.terminate()
    process.wait(30)
    assert subprocess.run(command, capture_output=True).returncode != 0
