"""Imports go downwards only, and what reads runs needs nothing but the standard library."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ["trainer", "export", "explorer", "streamlit_app"]  # from the ground up
# Each takes longer to load than a page may take to open, or is there for developers only.
SLOW = ["torch", "torchvision", "onnxruntime", "onnx", "vl_convert", "captum", "tensorboard"]
SLOW += ["fsspec", "s3fs", "mlflow"]  # and what only runs elsewhere need
NOT_INSTALLED = ["scipy", "statsmodels", "playwright"]


def imports(path: Path) -> set[str]:
    """Top-level names of everything a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_go_downwards(floor: str) -> None:
    above = set(FLOORS[FLOORS.index(floor) + 1 :])
    for path in [*(ROOT / floor).rglob("*.py"), *ROOT.glob(f"{floor}.py")]:
        assert not above & {name.partition(".")[0] for name in imports(path)}, path


_STANDARD_LIBRARY_ONLY = ("schema", "files", "runlog", "run_writer", "cli")


@pytest.mark.parametrize("module", _STANDARD_LIBRARY_ONLY)
def test_runs_on_disk_need_the_standard_library_only(module: str) -> None:
    allowed = set(sys.stdlib_module_names) | {"trainer"}
    for name in imports(ROOT / "trainer" / f"{module}.py"):
        assert name.partition(".")[0] in allowed
        if name.startswith("trainer."):
            assert name.removeprefix("trainer.") in _STANDARD_LIBRARY_ONLY


def test_only_pages_touch_streamlit() -> None:
    for path in (ROOT / "explorer").rglob("*.py"):
        assert ("streamlit" in imports(path)) <= (path.parent.name == "pages"), path


def test_opening_the_app_loads_nothing_that_is_slow() -> None:
    files = [*(ROOT / "explorer").rglob("*.py"), ROOT / "streamlit_app.py"]
    names = sorted(".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files)
    modules = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    code = (
        "import importlib, json, sys\n"
        f"unwanted, loaded = {[*SLOW, *NOT_INSTALLED]}, {{}}\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
        "    for other in unwanted:\n"
        "        if other in sys.modules: loaded.setdefault(other, name)\n"
        "print(json.dumps(loaded))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {}  # what was loaded, and the module that did it first


def test_no_page_hides_a_module() -> None:
    # Streamlit looks for modules first in the folder of the script that it runs.
    pages = {path.stem for path in (ROOT / "explorer/pages").glob("*.py")}
    assert not pages & {*FLOORS, *sys.stdlib_module_names}


def test_only_one_thread_at_a_time_imports_altair() -> None:
    """Two that begin at once, the app's own and a visitor's, find its modules half done."""
    code = (
        "import sys, threading\n"
        "from streamlit_app import load\n"
        "import explorer.pages.app\n"
        "assert 'altair' not in sys.modules\n"
        "failed = []\n"
        "def visit():\n"
        "    try: load()\n"
        "    except Exception as error: failed.append(error)\n"
        "threads = [threading.Thread(target=visit) for _ in range(8)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "assert not failed, failed\n"
        "import explorer.pages.parts\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
