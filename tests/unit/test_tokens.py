"""Tokens of a user of etcd: one for all commands of a caller, who alone can read it, and a new one if need be."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calicoctl import files
from calicoctl.datastore import tokens
from calicoctl.datastore.etcd3_http import FAILED_PRECONDITION, INVALID_ARGUMENT, ErrorAnswer
from calicoctl.datastore.settings import EtcdSettings
from calicoctl.errors import StoreError

SETTINGS = EtcdSettings("http", (("a", 1), ("b", 2)), username="calico", password="hunter2")


class Member:
    """A member of etcd, as far as it lets users in."""

    url = "http://a:1"

    def __init__(self) -> None:
        self.token: str | None = None
        self.logins = 0
        self.fails: ErrorAnswer | None = None

    def exchange(self, method: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        assert (method, path, self.token) == ("POST", "/v3/auth/authenticate", None)
        self.logins += 1
        if self.fails is not None:
            raise self.fails
        return {"header": {}, "token": f"{body['name']}.{body['password'][::-1]}.{self.logins}"}

    def no_etcd(self, what: object) -> StoreError:
        return StoreError(str(what))


@pytest.fixture
def member() -> Member:
    return Member()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the caller's token; no command has run yet."""
    monkeypatch.setattr(files, "RUN", tmp_path / "run")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "user"))
    (tmp_path / "user").mkdir(mode=0o700)
    new_command()
    return tmp_path / ("run" if os.geteuid() == 0 else "user")


def new_command() -> None:
    tokens._tokens.clear()


def get(member: Member, *refused: str, settings: EtcdSettings = SETTINGS) -> str | None:
    authorize = tokens.authorize(settings)
    assert authorize is not None
    return authorize(member, refused)[0]  # type: ignore[arg-type]


def is_new(member: Member, *refused: str) -> bool:
    authorize = tokens.authorize(SETTINGS)
    assert authorize is not None
    return authorize(member, refused)[1]  # type: ignore[arg-type]


def test_a_login_uses_the_password_that_is_in_the_file_now(member: Member, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.touch(0o600)
    file.write_text("hunter2\n")
    settings = EtcdSettings.from_environment({"ETCD_USERNAME": "calico", "ETCD_PASSWORD_FILE": str(file)})
    old = get(member, settings=settings)
    assert old == "calico.2retnuh.1"
    file.write_text("swordfish\n")
    assert get(member, settings=settings) == old and get(member, old, settings=settings) == "calico.hsifdrows.2"
    file.unlink()
    with pytest.raises(StoreError, match="cannot read"):
        get(member, old, "calico.hsifdrows.2", settings=settings)


def test_without_a_user_there_is_no_token() -> None:
    assert tokens.authorize(EtcdSettings("http", (("a", 1),))) is None


def test_the_next_command_uses_the_token_which_only_its_caller_can_read(member: Member, folder: Path) -> None:
    old = os.umask(0)
    try:
        first = get(member)
    finally:
        os.umask(old)
    assert first == "calico.2retnuh.1" == get(member)
    new_command()
    assert get(member) == first and member.logins == 1
    (file,) = folder.iterdir()
    assert file.name == ".etcd-token" and file.stat().st_mode & 0o7777 == 0o600
    assert "hunter2" not in file.read_text() and folder.stat().st_mode & 0o022 == 0
    tokens.forget()
    assert list(folder.iterdir()) == []


def test_a_refused_token_is_replaced(member: Member) -> None:
    first = get(member)
    member.token = first
    second = get(member, str(first))
    assert second != first and get(member) == second
    new_command()
    assert get(member) == second and member.logins == 2
    # another process was faster
    new_command()
    assert get(member, str(first)) == second and member.logins == 2


def test_each_kept_token_is_tried_once_before_a_new_one(member: Member) -> None:
    old = get(member)
    new_command()
    others = get(member, "of a restart", str(old))
    of_file = tokens._read(SETTINGS)
    assert of_file == others and member.logins == 2
    tokens._tokens[SETTINGS] = "of this process"
    assert get(member, "sent") == "of this process" and not is_new(member, "sent")
    assert get(member, "sent", "of this process") == others == get(member)
    assert member.logins == 2
    tokens._tokens[SETTINGS] = "of this process"
    assert get(member, "sent", "of this process", str(others)) == "calico.2retnuh.3" == get(member)
    assert is_new(member, "sent", "calico.2retnuh.3")
    # whatever is kept meanwhile, the member's refusals have an end
    assert is_new(member, "1", "2", "3") and not is_new(member, "1", "2")


def test_a_token_that_is_needed_since_just_now_is_got_in_the_next_attempt(member: Member) -> None:
    member.fails = ErrorAnswer(FAILED_PRECONDITION, "etcdserver: authentication is not enabled")
    assert not is_new(member, "old") and get(member) is None
    assert is_new(member, "old", "")
    member.fails = None
    assert get(member, "old", "") == "calico.2retnuh.3"


def test_many_threads_log_in_once(member: Member) -> None:
    first = get(member)
    found = []
    threads = [threading.Thread(target=lambda: found.append(get(member, str(first)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and member.logins == 2


@pytest.mark.parametrize(
    "other",
    [
        EtcdSettings("http", (("a", 1), ("b", 2)), username="calico", password="hunter3"),
        EtcdSettings("http", (("a", 1), ("b", 2)), username="root", password="hunter2"),
        EtcdSettings("http", (("a", 1), ("c", 2)), username="calico", password="hunter2"),
        EtcdSettings("https", (("a", 1), ("b", 2)), username="calico", password="hunter2"),
    ],
)
def test_a_token_is_for_one_user_password_and_cluster(member: Member, other: EtcdSettings) -> None:
    first = get(member)
    new_command()
    assert get(member, settings=other) != first and member.logins == 2


def test_an_etcd_without_users_is_asked_once_and_again_when_it_wants_one(member: Member, folder: Path) -> None:
    member.fails = ErrorAnswer(FAILED_PRECONDITION, "etcdserver: authentication is not enabled")
    assert get(member) is None and get(member) is None
    assert member.logins == 1 and not (folder / ".etcd-token").exists()
    member.fails = None
    assert get(member, "") == "calico.2retnuh.2" == get(member)


def test_a_wrong_password_is_an_error_that_does_not_quote_it(member: Member) -> None:
    member.fails = ErrorAnswer(INVALID_ARGUMENT, "authentication failed, invalid user ID or password")
    with pytest.raises(StoreError, match=r"does not let user 'calico' in .*: see ETCD_USERNAME") as refused:
        get(member)
    assert "hunter2" not in str(refused.value)


def _opened(file: Path) -> None:
    file.chmod(0o640)


def _linked(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def _garbled(file: Path) -> None:
    file.write_text('["salt", 1]')


def _emptied(file: Path) -> None:
    file.write_bytes(b"")


def _replaced_by_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("spoil", [_opened, _linked, _garbled, _emptied, _replaced_by_a_folder])
def test_a_file_that_is_not_as_it_was_written_is_not_used(
    member: Member, folder: Path, spoil: Callable[[Path], None]
) -> None:
    get(member)
    spoil(folder / ".etcd-token")
    new_command()
    assert get(member) == "calico.2retnuh.2"


@pytest.mark.parametrize("mode", [None, 0o755])
def test_who_has_no_folder_of_their_own_logs_in_each_time(
    member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int | None
) -> None:
    uid = os.geteuid()
    user = tmp_path / "user"
    if uid == 0:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        os.chown(user, 12345, -1)
    user.rmdir() if mode is None else user.chmod(mode)
    get(member)
    new_command()
    assert get(member) == "calico.2retnuh.2"
    assert not user.exists() or list(user.iterdir()) == []
    tokens.forget()
