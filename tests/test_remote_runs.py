"""Runs at a URL: what the explorer shows of them, never does, and says when they cannot be read."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from explorer import access, mirror
from explorer.access import ReadOnlyError
from explorer.annotations import Annotation, save_annotation
from explorer.classify import exported, slots
from explorer.data import Library, checkpoint_of, command_of, runs_dir_from
from explorer.exported import exported_table
from explorer.manage import delete
from explorer.mirror import Mirror, brought, known
from explorer.remote import AwayError, Listed, Remote, RemoteError, is_url, shown
from explorer.report import main as report_main
from tests.explorer_runs import record, write_finetune, write_run, write_trunk
from tests.s3_server import s3_server
from trainer.reproduce import ReproduceError

memory = pytest.importorskip("fsspec.implementations.memory", reason="needs fsspec")
URL = "memory://bucket/runs"
PAGES = ("compare", "runs", "sweep", "results", "changed", "classify", "exporting", "importing")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty store, and a cache folder of the test's own."""
    monkeypatch.setenv("THAW_CACHE", str(tmp_path / "cache"))
    system = memory.MemoryFileSystem()
    system.store.clear()
    system.makedirs("/bucket/runs", exist_ok=True)
    yield system
    system.store.clear()


def upload(store: Any, folder: Path) -> None:
    """Put there what has changed in a folder, and take away what has gone."""
    there = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for name, content in there.items():
        path = f"/bucket/runs/{name}"
        if not store.exists(path) or store.cat_file(path) != content:
            store.pipe_file(path, content)
    for path in store.find("/bucket/runs"):
        if path.removeprefix("/bucket/runs/") not in there:
            store.rm_file(path)


def fresh(url: str = URL) -> Library:
    """As an explorer that has just been started, and all has come."""
    mirror._mirror.cache_clear()
    mirror._MIRRORS.clear()
    library = Library.at(url)
    assert library.mirror is not None
    library.mirror.update()
    return library


def update(library: Library) -> None:
    assert library.mirror is not None
    library.mirror.update()


# --- which one ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "is_so"),
    [
        ("s3://bucket/runs", True),
        ("gs://bucket", True),
        ("simplecache::s3://b/r", True),
        ("SFTP://host/runs", True),
        ("runs", False),
        ("/a/s3://b", False),
        ("C:/runs", False),
        ("s3:/bucket", False),
    ],
)
def test_a_url_is_told_from_a_folder(place: str, is_so: bool) -> None:
    assert is_url(place) == is_so


def test_what_may_be_secret_is_not_shown() -> None:
    assert shown("sftp://me:secret@host/runs?sig=abc") == "sftp://host/runs"
    assert shown("s3://bucket/runs") == "s3://bucket/runs"


# --- what is seen -------------------------------------------------------------------------------


def test_runs_elsewhere_are_seen_as_if_they_were_here(store: Any, tmp_path: Path) -> None:
    local = tmp_path / "local"
    trunk = write_trunk(local)
    child = write_finetune(local, trunk, "child", [0.70, 0.74])
    save_annotation(child.path, Annotation(name="Mine"))
    child.predictions("before").write_bytes(b"npz")
    (local / "oregon.results.json").write_text("{}")
    upload(store, local)
    library = fresh()
    found, here = library.snapshot(), Library(local).snapshot()
    assert found.labels == here.labels
    assert [run.epochs for run in found.runs.values()] == [run.epochs for run in here.runs.values()]
    assert found.runs[child.run_id].predictions("before").read_bytes() == b"npz"
    assert (library.runs_dir / "oregon.results.json").is_file()
    assert runs_dir_from(["--runs-dir", URL], {}) == library.runs_dir
    assert library.mirror is not None
    assert library.mirror.standing.problem == ""


def test_a_run_that_is_written_appears_live_and_only_changes_are_fetched(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = tmp_path / "local"
    trunk = write_trunk(local)
    live = write_finetune(local, trunk, "live", [0.70], done=False)
    upload(store, local)
    library = fresh()
    assert library.snapshot().running == {live.run_id}
    fetched = list[str]()
    real = Remote.fetch

    def noting(self: Remote, name: str, *rest: Any) -> Listed:
        fetched.append(name)
        return real(self, name, *rest)

    monkeypatch.setattr(Remote, "fetch", noting)
    update(library)
    assert fetched == []
    live.epoch(record("finetune", 4, 1, 0.72))
    upload(store, local)
    update(library)
    assert fetched == [f"{live.run_id}/metrics.jsonl"]
    assert len(library.snapshot().runs[live.run_id].epochs) == 2
    live.close("done")
    upload(store, local)
    update(library)
    # A run.json that says "done" comes before a log, which is then complete.
    assert fetched[1:] == [f"{live.run_id}/run.json", f"{live.run_id}/metrics.jsonl"]
    assert not library.snapshot().running


def test_a_run_that_has_said_nothing_for_a_day_was_killed(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = write_run(tmp_path / "local", "live", [0.5], done=False)
    upload(store, tmp_path / "local")
    assert fresh().snapshot().runs[live.run_id].status == "running"
    monkeypatch.setattr("explorer.data._SILENT_SECONDS", -1.0)
    assert fresh().snapshot().runs[live.run_id].status == "interrupted"


def test_what_is_deleted_there_goes_here(store: Any, tmp_path: Path) -> None:
    local = tmp_path / "local"
    first, second = write_trunk(local, "a"), write_trunk(local, "b")
    upload(store, local)
    library = fresh()
    store.rm(f"/bucket/runs/{first}", recursive=True)
    update(library)
    assert list(library.snapshot().runs) == [second]
    assert [path.name for path in library.runs_dir.iterdir()] == [second]


def test_an_explorer_that_is_started_again_fetches_nothing_twice(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = write_trunk(tmp_path / "local")
    upload(store, tmp_path / "local")
    folder = fresh().runs_dir
    (folder / trunk / "predictions").mkdir()
    (folder / trunk / "predictions" / "after.npz").write_bytes(b"nobody noted it")
    (folder.parent / "7.coming").write_bytes(b"half of a file")
    (folder / trunk / "metrics.jsonl").write_text("cut short by a crash")
    fetched = list[str]()
    real = Mirror._fetch

    def noting(self: Mirror, name: str) -> None:
        fetched.append(name)
        real(self, name)

    monkeypatch.setattr(Mirror, "_fetch", noting)
    library = fresh()
    assert fetched == [f"{trunk}/metrics.jsonl"]
    assert len(library.snapshot().runs[trunk].epochs) == 4
    assert not (folder / trunk / "predictions" / "after.npz").exists()
    assert not list(folder.parent.glob("*.coming"))


def test_a_cache_that_is_deleted_is_filled_again(store: Any, tmp_path: Path) -> None:
    trunk = write_trunk(tmp_path / "local")
    upload(store, tmp_path / "local")
    library = fresh()
    shutil.rmtree(library.runs_dir.parent)
    assert not library.snapshot().runs
    update(library)
    assert list(library.snapshot().runs) == [trunk]


def test_a_second_explorer_has_a_folder_of_its_own(store: Any, tmp_path: Path) -> None:
    write_trunk(tmp_path / "local")
    upload(store, tmp_path / "local")
    first = fresh()
    second = Mirror(URL, first.runs_dir.parent)
    second.update()
    assert second.folder != first.runs_dir
    assert len(Library(second.folder, second).snapshot().runs) == 1


# --- networks come when they are asked for ------------------------------------------------------


def with_networks(local: Path) -> tuple[str, str]:
    trunk = write_trunk(local)
    child = write_finetune(local, trunk, "child", [0.70, 0.74])
    child.update(parent_checkpoint={"file": "transfer-last.pt"})
    (local / trunk / "checkpoints/transfer-last.pt").write_bytes(b"before")
    child.checkpoint("finetune-best").write_bytes(b"after")
    (child.path / "checkpoints/finetune-best.pt.sha256").write_bytes(b"hash")
    (child.path / "model.onnx").write_bytes(b"onnx")
    return trunk, child.run_id


def test_networks_are_fetched_when_they_are_asked_for(store: Any, tmp_path: Path) -> None:
    trunk, child = with_networks(tmp_path / "local")
    upload(store, tmp_path / "local")
    library = fresh()
    run = library.snapshot().runs[child]
    before, after = (slot.path for slot in slots(run))
    assert before == library.runs_dir / trunk / "checkpoints/transfer-last.pt"
    assert after == checkpoint_of(run, "after")
    assert not before.exists()
    assert exported_table(library.snapshot())["Size"].tolist() == [4e-6]
    assert brought(before).read_bytes() == b"before"
    assert brought(after).with_name("finetune-best.pt.sha256").read_bytes() == b"hash"
    onnx = exported(run)
    assert onnx is not None
    assert brought(onnx).read_bytes() == b"onnx"
    store.pipe_file(f"/bucket/runs/{child}/model.onnx", b"newer")
    update(library)
    assert not onnx.exists()  # not an old one for a new one
    assert brought(onnx).read_bytes() == b"newer"
    store.rm_file(f"/bucket/runs/{child}/model.onnx")
    update(library)
    assert exported(run) is None


def test_networks_that_nobody_uses_make_room(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk, child = with_networks(tmp_path / "local")
    upload(store, tmp_path / "local")
    library = fresh()
    onnx = library.runs_dir / child / "model.onnx"
    brought(onnx)
    monkeypatch.setattr("explorer.mirror._KEPT_BYTES", 5)
    before = library.runs_dir / trunk / "checkpoints/transfer-last.pt"
    assert brought(before).is_file()  # larger than all that may be kept, but wanted now
    assert not onnx.exists()
    assert known(onnx) == mirror.Known(4, pytest.approx(time.time(), abs=60))


# --- who put it there is not trusted ------------------------------------------------------------


def test_names_that_lead_elsewhere_are_never_fetched(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = write_trunk(tmp_path / "local")
    upload(store, tmp_path / "local")
    info = b'{"schema_version": 1}'
    names = [
        *("../escaped/run.json", "/etc/run.json", "a/../../b/run.json", ".hidden/run.json"),
        *("a/run.json/../x", "a\0b/run.json", "-x/run.json", "a b/run.json", "a/model-../x.onnx"),
        *("a/checkpoints/../run.json", "a/predictions/x.npz", "a/evil.sh", "mirror.json", "lock"),
        *("lr-find/../../x.json", "../x.results.json", "a\n/run.json", f"{'a' * 101}/run.json"),
    ]
    real = Remote.listing
    extra = {name: Listed("v", len(info)) for name in names}
    monkeypatch.setattr(Remote, "listing", lambda self: real(self) | extra)
    library = fresh()
    assert list(library.snapshot().runs) == [trunk]
    # Nothing but what the mirror itself keeps.
    outside = [path for path in tmp_path.rglob("*") if path.is_file()]
    inside = (tmp_path / "local", library.runs_dir / trunk)
    assert {path.name for path in outside if not any(map(path.is_relative_to, inside))} == {
        "lock",
        "mirror.json",
    }


def test_what_is_too_large_is_left_out_and_said(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = tmp_path / "local"
    good, large = write_trunk(local, "good"), write_trunk(local, "large")
    (local / large / "run.json").write_bytes(b" " * 17_000_000)
    upload(store, local)
    library = fresh()
    snapshot = library.snapshot()
    assert list(snapshot.runs) == [good]
    assert f"{URL}/{large}/run.json has more than 16 MB" in snapshot.broken[large]
    # Also where a listing says less than what comes.
    real = Remote.listing
    lie = {f"{large}/run.json": Listed("v", 10)}
    monkeypatch.setattr(Remote, "listing", lambda self: real(self) | lie)
    update(library)
    assert "has more than 16 MB" in library.snapshot().broken[large]
    (local / large / "run.json").write_bytes(b"{}")
    monkeypatch.undo()


def test_a_file_where_a_folder_is_wanted_is_said(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = write_trunk(tmp_path / "local")
    upload(store, tmp_path / "local")
    name = "x.results.json"
    real = Remote.listing
    both = {path: Listed("v", 2) for path in (name, f"{name}/run.json")}

    def fetch(self: Remote, name: str, expected: Listed, into: Path, most: int) -> Listed:
        into.write_bytes(b"{}" if name in both else store.cat_file(f"/bucket/runs/{name}"))
        return expected

    monkeypatch.setattr(Remote, "listing", lambda self: real(self) | both)
    monkeypatch.setattr(Remote, "fetch", fetch)
    library = fresh()
    assert list(library.snapshot().runs) == [good]
    assert "a file and a folder at once" in library.snapshot().broken[name]


def test_too_many_files_are_no_runs_folder(
    store: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_trunk(tmp_path / "local")
    upload(store, tmp_path / "local")
    monkeypatch.setattr("explorer.remote.MOST_FILES", 1)
    with pytest.raises(AwayError, match="holds more than 1 files: it cannot be a runs folder"):
        fresh()


def test_a_file_that_changes_while_it_is_fetched_is_fetched_whole(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.pipe_file("/bucket/runs/a/run.json", b"old and long")
    source = Remote(URL)
    [listed] = source.listing().values()
    real, turns = type(store).get_file, iter((b"new", b"newer", None))

    def meanwhile(self: Any, path: str, into: str, **options: Any) -> None:
        real(self, path, into, **options)
        if (content := next(turns)) is not None:
            store.pipe_file("/bucket/runs/a/run.json", content)

    monkeypatch.setattr(type(store), "get_file", meanwhile)
    found = source.fetch("a/run.json", listed, tmp_path / "x", 100)
    assert (tmp_path / "x").read_bytes() == b"newer"
    assert found.size == 5
    assert found != listed


# --- nothing is written -------------------------------------------------------------------------


def test_nothing_can_be_changed(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = write_trunk(tmp_path / "local")
    upload(store, tmp_path / "local")
    library = fresh()
    monkeypatch.setenv("THAW_RUNS_DIR", URL)
    monkeypatch.setenv("THAW_READ_ONLY", "0")
    monkeypatch.setattr("sys.argv", ["streamlit_app.py"])
    said = f"The runs are at {URL}, and Thaw only reads what is not on this machine."
    assert access.read_only_because() == said
    with pytest.raises(ReadOnlyError, match="Thaw only reads what is not on this machine"):
        save_annotation(library.runs_dir / trunk, Annotation(name="x"))
    with pytest.raises(ReadOnlyError):
        delete(library.runs_dir, [trunk])
    with pytest.raises(ReproduceError, match=f"The run is at {URL}, where nothing can be trained"):
        command_of(library.snapshot().runs[trunk])


# --- when it cannot be read ---------------------------------------------------------------------


class NoCredentialsError(Exception):
    """As botocore's is called."""


class EndpointConnectionError(ConnectionError):
    """As botocore's is called."""


@pytest.mark.parametrize(
    ("url", "error", "said"),
    [
        ("s3://b/r", NoCredentialsError("Unable to locate credentials"), "Give the explorer a key"),
        ("s3://b/r", PermissionError("Access Denied"), "Access Denied. Check the key"),
        ("s3://b/r", EndpointConnectionError("Could not connect"), "Check the network"),
        ("s3://b/r", FileNotFoundError("The specified bucket does not exist"), "Name the bucket"),
        ("s3://b/r", ImportError("Install s3fs to access S3"), "requirements-remote.txt"),
        (
            "s3://b/r",
            RuntimeError("at http://u:p@h/x?sig=1 odd"),
            "at http://h/x odd. Check the URL",
        ),
        ("thaw://b/r", None, "Protocol not known: thaw. Use one of fsspec's protocols"),
        ("file:///tmp/runs", None, "is a folder of this machine. Give its path"),
        ("simplecache::file:///tmp/runs", None, "is a folder of this machine"),
    ],
)
def test_what_is_wrong_is_said_with_place_and_remedy(
    url: str, error: Exception | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Remote(url)
    if error is not None:

        def failing(self: Remote) -> None:
            raise error

        monkeypatch.setattr(Remote, "_opened", failing)
    with pytest.raises(AwayError) as caught:
        source.listing()
    assert said in str(caught.value)
    assert url in str(caught.value)


def test_what_was_fetched_stays_when_the_server_goes(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, child = with_networks(tmp_path / "local")
    upload(store, tmp_path / "local")
    fresh()

    def failing(self: Remote) -> None:
        raise EndpointConnectionError("Could not connect")

    monkeypatch.setattr(Remote, "_opened", failing)
    mirror._mirror.cache_clear()
    mirror._MIRRORS.clear()
    library = Library.at(URL)  # an explorer that is started while the server is away
    with pytest.raises(AwayError, match="Could not connect"):
        update(library)
    assert library.mirror is not None
    assert "Check the network" in library.mirror.standing.problem
    assert library.mirror.standing.fetched == pytest.approx(time.time(), abs=60)
    run = library.snapshot().runs[child]
    assert len(run.epochs) == 2
    with pytest.raises(RemoteError, match="Could not connect"):
        brought(checkpoint_of(run, "after"))
    monkeypatch.undo()


def test_a_cache_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("THAW_CACHE", str(tmp_path / "file"))
    library = Library.at(URL)
    assert library.snapshot().runs == {}
    assert library.mirror is not None
    assert "cannot be written" in library.mirror.standing.problem
    assert "THAW_CACHE" in library.mirror.standing.problem


def test_a_disk_without_room_is_said(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = write_trunk(tmp_path / "local")
    upload(store, tmp_path / "local")
    monkeypatch.setattr("explorer.mirror._SPARE_BYTES", 1 << 60)
    assert "Make room there" in fresh().snapshot().broken[trunk]


def test_mirrors_that_nobody_uses_go(store: Any, tmp_path: Path) -> None:
    old = fresh("memory://bucket/old").runs_dir.parent
    mirror._mirror.cache_clear()
    mirror._MIRRORS.clear()
    os.utime(old / "lock", (0, 0))
    new = fresh().runs_dir.parent
    assert new.is_dir()
    assert not old.exists()


# --- the pages ----------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(store: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("THAW_RUNS_DIR", URL)
    monkeypatch.setattr("sys.argv", ["streamlit_app.py"])
    mirror._mirror.cache_clear()
    mirror._MIRRORS.clear()
    return store


def page(name: str) -> AppTest:
    def show(name: str) -> None:
        from importlib import import_module

        import_module(f"explorer.pages.{name}").page()

    app = AppTest.from_function(show, args=(name,), default_timeout=60).run()
    assert not app.exception
    return app


def all_text(app: AppTest) -> str:
    return " ".join(str(one.value) for kind in (app.html, app.text, app.error) for one in kind)


def test_every_page_shows_them_and_says_where_they_are(elsewhere: Any, tmp_path: Path) -> None:
    trunk = write_trunk(tmp_path / "local")
    write_finetune(tmp_path / "local", trunk, "child", [0.70, 0.74])
    upload(elsewhere, tmp_path / "local")
    for name in PAGES:
        assert f"Runs at {URL}, as of " in all_text(page(name)), name


def test_without_runs_it_says_how_they_come_there(elsewhere: Any) -> None:
    app = page("compare")
    assert f"There is nothing to show at {URL}" in all_text(app)
    assert any("rclone sync runs" in block.value for block in app.code)


def test_every_page_says_what_is_wrong(
    elsewhere: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Remote) -> None:
        raise EndpointConnectionError("Could not connect")

    monkeypatch.setattr(Remote, "_opened", failing)
    for name in PAGES:
        said = all_text(page(name))
        assert "Could not connect. Check the network" in said, name
        assert "nothing fetched yet" in said


def test_a_report_of_runs_elsewhere(store: Any, tmp_path: Path) -> None:
    trunk = write_trunk(tmp_path / "local")
    upload(store, tmp_path / "local")
    out = tmp_path / "report.html"
    assert report_main([trunk, "--runs-dir", URL, "-o", str(out)]) == 0
    assert f"The run is at {URL}" in out.read_text()
    assert report_main(["all", "--runs-dir", "thaw://x", "-o", str(out)]) == 2


# --- a real S3-compatible server ----------------------------------------------------------------


@contextmanager
def cutting(target: str, after: int) -> Iterator[str]:
    """A way to a server that breaks every connection after so many bytes of its answers."""
    host, port = target.removeprefix("http://").split(":")
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, to: socket.socket, most: int) -> None:
        with contextlib.suppress(OSError):
            while most > 0 and (data := source.recv(min(4096, most))):
                to.sendall(data)
                most -= len(data)
        for one in (source, to):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection((host, int(port)))
                for ends in ((client, server, 1 << 40), (server, client, after)):
                    threading.Thread(target=pump, args=ends, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    with listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


S3 = "s3://bucket/runs"


@pytest.mark.slow
def test_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    local = tmp_path / "buckets/bucket/runs"
    local.mkdir(parents=True)
    trunk, child = with_networks(local)
    live = write_finetune(local, trunk, "live", [0.70], done=False)
    with s3_server(tmp_path / "buckets"):
        library = fresh(S3)
        assert library.snapshot().running == {live.run_id}
        live.epoch(record("finetune", 4, 1, 0.72))
        update(library)
        assert len(library.snapshot().runs[live.run_id].epochs) == 2
        run = library.snapshot().runs[child]
        assert brought(checkpoint_of(run, "after")).read_bytes() == b"after"
        with pytest.raises(AwayError, match="The specified bucket does not exist"):
            fresh("s3://nobucket/runs")
        with monkeypatch.context() as patch:
            patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
            with pytest.raises(AwayError, match=r"signature .* AWS_SECRET_ACCESS_KEY"):
                fresh(S3)
            patch.delenv("AWS_SECRET_ACCESS_KEY")
            patch.delenv("AWS_ACCESS_KEY_ID")
            with pytest.raises(AwayError, match="Unable to locate credentials"):
                fresh(S3)
        library = fresh(S3)
    with pytest.raises(AwayError, match="Could not connect"):
        update(library)
    assert len(library.snapshot().runs[live.run_id].epochs) == 2
    assert library.mirror is not None
    assert "Check the network" in library.mirror.standing.problem


@pytest.mark.slow
def test_s3_over_a_bad_line_gives_whole_files_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THAW_CACHE", str(tmp_path / "cache"))
    local = tmp_path / "buckets/bucket/runs"
    local.mkdir(parents=True)
    _, child = with_networks(local)
    content = os.urandom(300_000)
    (local / child / "model.onnx").write_bytes(content)
    (local / child / "predictions/after.npz").write_bytes(content)
    with s3_server(tmp_path / "buckets") as endpoint, cutting(endpoint, 100_000) as line:
        monkeypatch.setenv("AWS_ENDPOINT_URL", line)
        library = fresh(S3)
        assert (library.runs_dir / child / "predictions/after.npz").read_bytes() == content
        assert brought(library.runs_dir / child / "model.onnx").read_bytes() == content
    with s3_server(tmp_path / "buckets") as endpoint, cutting(endpoint, 6_000) as line:
        monkeypatch.setenv("AWS_ENDPOINT_URL", line)
        with pytest.raises(AwayError):
            fresh(S3)
        for path in (tmp_path / "cache").rglob("*.npz"):
            assert path.read_bytes() == content
        assert not list((tmp_path / "cache").rglob("*.coming"))
