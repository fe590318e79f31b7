"""Who may see the runs and who may change them: read-only mode, sign-in, and what can be opened."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from explorer import access
from explorer.access import ReadOnlyError, Server, allowed_addresses, exposure, is_let_in
from explorer.annotations import Annotation, load_annotation, save_annotation
from explorer.classify import slots
from explorer.data import Library
from explorer.exporting import Jobs
from explorer.headers import SafeHeaders
from explorer.importing import bring_in
from explorer.manage import archive, delete
from explorer.shipped import checkpoint_or_reason
from tests.explorer_runs import write_finetune, write_trunk
from trainer.runlog import read_run

ROOT = Path(__file__).resolve().parents[1]
HERE = Server(address="127.0.0.1", cors=True, xsrf=True, sign_in=False)
AUTH = {
    "redirect_uri": "http://localhost:8501/oauth2callback",
    "cookie_secret": "a secret of more than fourteen bytes",
    "client_id": "thaw",
    "client_secret": "s",
    "server_metadata_url": "http://localhost/.well-known/openid-configuration",
}
ANN = {"is_logged_in": True, "email": "Ann@Example.org", "email_verified": True}
PAGES = ("compare", "runs", "sweep", "results", "changed", "classify", "exporting", "importing")
CHANGING = {"Edit", "Archive", "Unarchive", "Delete"}
EXPORTING = {"Export", "Export again"}  # on the page of runs it only leads to the page of exports


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    monkeypatch.setenv("THAW_RUNS_DIR", str(folder))
    monkeypatch.setattr("sys.argv", ["streamlit_app.py"])
    return folder


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THAW_READ_ONLY", "1")


# --- when it is read-only -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["--read-only"], ["--runs-dir", "x", "--read-only"], ["--readonly"], ["--read-only=yes"]],
)
def test_the_command_line_asks_for_it(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["streamlit_app.py", *arguments])
    assert access.read_only_because() == "The explorer was started read-only."
    monkeypatch.setenv("THAW_READ_ONLY", "0")
    assert access.read_only_because() == "The explorer was started read-only."


@pytest.mark.parametrize(
    ("value", "is_so"), [("1", True), ("true", True), ("", False), ("0", False), ("No", False)]
)
def test_the_environment_asks_for_it(
    value: str, is_so: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["streamlit_app.py"])
    monkeypatch.setenv("THAW_READ_ONLY", value)
    assert bool(access.read_only_because()) == is_so


@pytest.mark.parametrize(
    ("server", "said"),
    [
        (HERE, ""),
        (Server("::1", True, True, False), ""),
        (Server("localhost", True, True, False), ""),
        (Server("0.0.0.0", True, True, False), "other machines (at 0.0.0.0)"),
        (Server("192.168.1.7", True, True, False), "other machines (at 192.168.1.7)"),
        (Server(None, True, True, False), "other machines (at every address)"),
        (Server("127.0.0.1", False, True, False), "protection against other pages"),
        (Server("127.0.0.1", True, False, False), "protection against other pages"),
        (Server("0.0.0.0", False, False, True), ""),
    ],
)
def test_an_app_that_others_can_reach_is_read_only(
    server: Server, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["streamlit_app.py"])
    monkeypatch.delenv("THAW_READ_ONLY", raising=False)
    try:
        access.note_exposure(exposure(server))
        assert (said in access.read_only_because()) and bool(said) == bool(
            access.read_only_because()
        )
        monkeypatch.setenv("THAW_READ_ONLY", "0")  # who says so may have it
        assert access.read_only_because() == ""
    finally:
        access.note_exposure("")


@pytest.mark.usefixtures("read_only")
def test_nothing_is_changed_whoever_asks(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the buttons but the functions refuse."""
    run = read_run(runs / write_trunk(runs))
    before = _content(runs)
    for change in (
        lambda: save_annotation(run.path, Annotation("x")),
        lambda: archive(run, True),
        lambda: delete(runs, [run.run_id]),
        lambda: Jobs().start(run.path / "model.onnx", [sys.executable, "-c", ""]),
        lambda: bring_in(runs, []),
    ):
        with pytest.raises(ReadOnlyError, match=r"is not possible here\. The explorer was"):
            change()
    assert _content(runs) == before
    monkeypatch.delenv("THAW_READ_ONLY")
    archive(run, True)
    assert load_annotation(run.path).archived


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _page(name: str) -> None:
    from importlib import import_module

    import_module(f"explorer.pages.{name}").page()


def page(name: str, **link: str | list[str]) -> AppTest:
    app = AppTest.from_function(_page, default_timeout=60, args=(name,))
    app.query_params.update(link)
    app.run()
    assert not app.exception
    return app


def words(app: AppTest) -> str:
    kinds = (app.text, app.caption, app.info, app.header, app.get("html"))
    return "\n".join(
        str(getattr(one, "value", None) or one.proto.body) for kind in kinds for one in kind
    )


@pytest.mark.usefixtures("read_only")
def test_read_only_pages_show_runs_and_say_why_buttons_are_absent(runs: Path) -> None:
    trunk = write_trunk(runs)
    run = write_finetune(runs, trunk, "child", [0.70, 0.74])
    (run.path / "checkpoints" / "finetune-best.pt").touch()
    before = _content(runs)
    said = {}
    for name in PAGES:
        app = page(name, run=run.run_id, ticked=[run.run_id], path=str(runs), data=str(runs))
        labels = {button.label for button in app.button}
        assert not labels & (CHANGING if name == "runs" else CHANGING | EXPORTING), name
        assert not [one for one in app.button if one.label.startswith("Import")], name
        assert len(app.header) == 1
        said[name] = words(app)
    why = "here. The explorer was started read-only."
    assert f"Runs cannot be renamed, archived or deleted {why}" in said["runs"]
    assert f"No export can be started {why}" in said["exporting"]
    assert f"Nothing can be imported {why}" in said["importing"]
    assert "read-only" not in said["compare"]  # where nothing is absent nothing is said
    assert _content(runs) == before


def test_elsewhere_the_buttons_are_there(runs: Path) -> None:
    app = page("runs", ticked=[write_trunk(runs)])
    assert {"Edit", "Archive", "Delete"} <= {button.label for button in app.button}


# --- sign-in ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user", "allowed", "is_so"),
    [
        ({}, None, False),
        ({"is_logged_in": False}, None, False),
        ({"is_logged_in": "true"}, None, False),
        ({"is_logged_in": True}, None, True),
        (ANN, ["ann@example.org"], True),
        (ANN, ["@example.org"], True),
        (ANN, ["@EXAMPLE.org", "bob@x"], True),
        (ANN, [], False),
        (ANN, ["example.org", "@ample.org", "@org"], False),
        (ANN | {"email": "ann@example.org@evil.com"}, ["@example.org"], False),
        (ANN | {"email": "ann@evil.com"}, ["@example.org"], False),
        (ANN | {"email": "\u212aim@example.org"}, ["kim@example.org"], False),  # Kelvin's K
        (ANN | {"email": "ann@example.or\u0261"}, ["@example.org"], False),
        (ANN | {"email_verified": False}, ["@example.org"], False),
        (ANN | {"email_verified": "false"}, ["@example.org"], False),
        (ANN | {"email": None}, ["@example.org"], False),
        (ANN | {"email": ["ann@example.org"]}, ["ann@example.org"], False),
    ],
)
def test_who_is_let_in(user: dict[str, Any], allowed: list[str] | None, is_so: bool) -> None:
    assert is_let_in(user, allowed) == is_so


def test_a_list_that_is_none_lets_nobody_in() -> None:
    assert allowed_addresses(None) is None
    assert allowed_addresses("ann@example.org") == ("ann@example.org",)
    assert allowed_addresses([" @example.org ", "", 7, "everybody"]) == ("@example.org",)
    for nonsense in (True, 7, {"@example.org": 1}, ["*"], "*"):
        assert allowed_addresses(nonsense) == ()


def app_of(secrets: dict[str, Any], user: dict[str, Any]) -> AppTest:
    app = AppTest.from_file(str(ROOT / "explorer/pages/app.py"), default_timeout=60)
    app.secrets.update(secrets)
    app.user = user
    app.run()
    assert not app.exception
    return app


@pytest.fixture
def authlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were installed: the tests that use it are slow ones."""
    monkeypatch.setattr("explorer.pages.sign_in.find_spec", lambda name: name)


@pytest.mark.usefixtures("authlib")
def test_before_signing_in_nothing_is_shown(runs: Path) -> None:
    write_trunk(runs, "confidential")
    for user in ({}, {"is_logged_in": False}, {"email": "ann@example.org"}):
        app = app_of({"auth": AUTH}, user)
        assert [button.label for button in app.button] == ["Sign in"]
        assert "confidential" not in str(app.main)
        assert not app.multiselect
    app = app_of({"auth": AUTH | {"google": {}, "entra": {}, "client_kwargs": {}}}, {})
    assert [one.label for one in app.button] == ["Sign in with `google`", "Sign in with `entra`"]


@pytest.mark.usefixtures("authlib", "runs")
def test_only_who_is_on_the_list_comes_in() -> None:
    for secrets in ({"auth": AUTH}, {"auth": AUTH, "thaw": {"allowed": ["@example.org"]}}):
        assert app_of(secrets, ANN).header[0].value == "Did unfreezing help, and by how much?"
    for allowed in (["bob@example.org"], [], "*", 7):
        app = app_of({"auth": AUTH, "thaw": {"allowed": allowed}}, ANN)
        assert "Ann@Example.org, but this explorer is not open to you" in app.text[0].value
        assert [button.label for button in app.button] == ["Sign out"]
        assert app.header[0].value == "Thaw"


def test_without_the_table_nobody_is_asked(runs: Path) -> None:
    write_trunk(runs)
    assert app_of({}, {}).header[0].value == "Did unfreezing help, and by how much?"


def test_what_is_set_up_by_half_lets_nobody_in(
    runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_trunk(runs)
    monkeypatch.setattr("explorer.pages.sign_in.find_spec", lambda name: None)
    app = app_of({"auth": AUTH}, {})
    assert "is not installed" in app.error[0].value
    assert not app.button
    assert app_of({"auth": {}}, {}).header[0].value == "Thaw"
    damaged = tmp_path / "secrets.toml"
    damaged.write_text("[auth\n")
    monkeypatch.setattr("explorer.pages.sign_in.st.get_option", lambda name: [str(damaged)])
    for user in ({}, ANN):
        app = app_of({}, user)
        assert "cannot be read, so nobody can sign in" in app.error[0].value
        assert not app.multiselect


@pytest.mark.usefixtures("authlib")
def test_the_account_page_says_who_and_signs_out(runs: Path) -> None:
    def account() -> None:
        from explorer.pages import sign_in

        sign_in.page()

    app = AppTest.from_function(account)
    app.user = ANN | {"email": "![x](http://127.0.0.1/x)"}
    app.run()
    assert app.text[0].value == "Signed in as ![x](http://127.0.0.1/x)."
    app.button[0].click().run()
    assert app.user.get("is_logged_in") is False


# --- what can be opened -------------------------------------------------------------------------

_opened: list[str] = []
_listening = False


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("open", "os.scandir", "os.listdir"):
        _opened.append(str(arguments[0]))


def opened_by(work: Callable[[], object]) -> list[str]:
    """The paths of all files and folders that are opened meanwhile."""
    global _listening
    if not _listening:  # an audit hook cannot be taken away
        sys.addaudithook(_listen)
        _listening = True
    _opened.clear()
    work()
    return list(_opened)


PARAMETERS = (
    *("run", "runs", "ticked", "group", "cell", "rates", "heat_class", "true_class"),
    *("said_before", "said_after", "sheet", "search", "status", "phase", "data", "tags", "sort"),
    *("colour", "dash", "axis", "photos", "part", "outcome", "checkpoint", "precision", "format"),
    *("accuracy", "trunk", "finetunes", "logs", "boundary", "as", "source", "answers"),
    *("photo_page", "maps", "against", "heat", "order", "archived", "lines", "compare_with"),
)


@pytest.mark.parametrize("name", PAGES)
def test_no_link_opens_anything_outside_of_the_runs_folder(
    runs: Path, tmp_path: Path, name: str
) -> None:
    trunk = write_trunk(runs)
    write_finetune(runs, trunk, "child", [0.70, 0.74])
    secret = tmp_path / "secret"
    hidden = [secret, runs / ".hidden" / "run", runs / ".deleted-12345678-x"]
    for folder in hidden:
        shutil.copytree(runs / trunk, folder)
    aims = [str(secret), "../secret", f"{trunk}/../../secret", ".hidden/run", "..", "\0", "/"]
    several = dict.fromkeys(("runs", "ticked", "tags"), aims)
    for turn in (0, 3):
        link = {one: aims[(turn + place) % 7] for place, one in enumerate(PARAMETERS)} | several
        paths = opened_by(lambda link=link: page(name, **link))
        assert [path for path in paths if path.startswith(str(runs))]
        forbidden = tuple(map(str, [secret, runs / ".hidden", *hidden]))
        assert not [path for path in paths if os.path.normpath(path).startswith(forbidden)]


def test_links_in_the_runs_folder_are_not_followed(runs: Path, tmp_path: Path) -> None:
    """Somebody who may write to a shared runs folder does not read with the explorer's eyes."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    other = write_trunk(elsewhere)
    (runs / "linked").symlink_to(elsewhere / other)
    (tmp_path / "secret").write_text("secret")
    for place in ("parity.json", "checkpoints/transfer-best.pt", "predictions/after.npz"):
        run = write_trunk(runs)
        (runs / run / place).symlink_to(tmp_path / "secret")
    moved = write_trunk(runs)
    shutil.move(runs / moved / "checkpoints", tmp_path / "checkpoints")
    (runs / moved / "checkpoints").symlink_to(tmp_path / "checkpoints")
    good = write_trunk(runs)
    library = Library(runs)
    snapshot = library.snapshot()
    assert list(snapshot.runs) == [good]
    assert len(snapshot.broken) == 5
    assert all("is a link. Thaw opens only what is in" in why for why in snapshot.broken.values())
    (runs / good / "model.onnx").symlink_to(tmp_path / "secret")  # comes while the app is open
    assert not library.snapshot().runs
    (runs / good / "model.onnx").unlink()
    assert list(library.snapshot().runs) == [good]


def test_a_parent_that_is_a_link_lends_no_checkpoint(runs: Path, tmp_path: Path) -> None:
    trunk = write_trunk(runs)
    child = write_finetune(runs, trunk, "child", [0.70, 0.74])
    child.update(parent_checkpoint={"file": "transfer-last.pt"})
    (runs / trunk / "checkpoints" / "transfer-last.pt").touch()
    run = read_run(child.path)
    assert slots(run)[0].path
    assert checkpoint_or_reason(run, "before") == slots(run)[0].path
    shutil.move(runs / trunk, tmp_path / "away")
    (runs / trunk).symlink_to(tmp_path / "away")
    assert "lies behind a link" in slots(run)[0].reason
    assert "lies behind a link" in str(checkpoint_or_reason(run, "before"))


# --- what the browser is told -------------------------------------------------------------------


def test_every_answer_tells_the_browser_to_stay_here() -> None:
    sent: list[Any] = []

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"Content-Security-Policy", b"default-src *"), (b"x-own", b"1")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def keep(message: Any) -> None:
        sent.append(message)

    asyncio.run(SafeHeaders(answer)({"type": "http"}, keep, keep))  # type: ignore[arg-type]
    headers = dict(sent[0]["headers"])
    assert len(sent[0]["headers"]) == 4
    assert headers[b"x-own"] == b"1"
    policy = headers[b"content-security-policy"].decode()
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "*" not in policy
    assert "http" not in policy
