"""The exceptions of this program. Each carries the sentence that the user reads.

They are printed only by `cli/main.py` and, in the agent's background process, by `felix/__main__.py`.

An exception of a library is converted by the code that calls the library: that code knows what was attempted, and what
the user can do about the failure.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Callable, TypeVar

T = TypeVar("T")


_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


def is_shortage(error: BaseException | None) -> bool:
    """Return whether an error, or an exception chained to it, was caused by a lack of file descriptors or memory."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _SHORTAGES):
            return True
        error = error.__cause__ or error.__context__
    return False


def printable(text: str) -> str:
    """Return a text with all unprintable characters escaped, except newlines: values from etcd may contain some."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Return a text with all unprintable characters and newlines escaped."""
    return printable(text).replace("\n", "\\n")


def redact_userinfo(text: str) -> str:
    """Return a URL with `…` instead of all before '@', which may contain a password; messages are logged.

    A text without '@' is returned as it is.
    """
    return "…@" + text.rpartition("@")[2] if "@" in text else text


class CalicoError(Exception):
    """The base class of all errors that reach the user. The text is one line.

    `exit_status` is the exit status of the process: 1 ("not done") unless a subclass says otherwise.
    """

    exit_status = 1


@contextmanager
def about(option: str) -> Iterator[None]:
    """Prefix the text of a CalicoError from the body of `with` with the option that caused the error, such as `--ip`.

    The new error is a plain CalicoError, whatever the subclass was.
    """
    try:
        yield
    except CalicoError as error:
        raise CalicoError(f"{option}: {error}") from None


class UsageError(CalicoError):
    """The command line does not match the grammar, or has an invalid value; `usage` is the usage text to show."""

    exit_status = 2

    def __init__(self, why: str, usage: str = "") -> None:
        super().__init__(why)
        self.usage = usage


class NotRoot(CalicoError):
    """The command needs root."""

    exit_status = 2


class Failed(CalicoError):
    """An operation failed, and the process is to end with `exit_status`."""

    def __init__(self, why: str, exit_status: int) -> None:
        super().__init__(why)
        self.exit_status = exit_status


class Failures(CalicoError):
    """Some of several operations failed, each with its own error; the exit status is that of the first error."""

    def __init__(self, errors: list[CalicoError]) -> None:
        super().__init__("; ".join(map(str, errors)))
        self.errors = errors
        self.exit_status = errors[0].exit_status


def for_each(things: Iterable[T], act: Callable[[T], None]) -> None:
    """Call `act` for each of `things`, even after a CalicoError. At the end, raises Failures if there were any."""
    errors: list[CalicoError] = []
    for thing in things:
        try:
            act(thing)
        except CalicoError as error:
            errors.append(error)
    if errors:
        raise Failures(errors)


class NotFound(CalicoError):
    """The object to remove, show or change does not exist."""


class Conflict(CalicoError):
    """Other commands or hosts kept changing the same object, or kept it locked. A later retry may succeed."""


class InvalidValue(CalicoError):
    """A key of the store has an invalid value; `why` says what is wrong with it."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(f"etcd key {key} has an invalid value: {why}; fix or delete it")
        self.key = key
        self.why = why


class StoreError(CalicoError):
    """The store refused a request or gave a wrong answer, or the settings that select the store are invalid."""


class StoreUnavailable(StoreError):
    """No member of the store answered."""


class NoSuchApi(StoreError):
    """The servers do not have the API of etcd that was asked for."""


class Frozen(StoreError):
    """The store may not be changed now: its data is being moved to another API of etcd."""


class WatchExpired(StoreError):
    """A watch has missed changes, for example because the store no longer keeps them: read everything again."""


class KeyExists(CalicoError):
    """A create-only write found an existing key."""


class CompareFailed(CalicoError):
    """A compare-and-swap failed, since the key no longer had the value that was read.

    `maybe_applied` is true if an earlier, unanswered attempt of the same write may have been applied before another
    writer overwrote the key.
    """

    def __init__(self, key: str, maybe_applied: bool = False) -> None:
        super().__init__(f"etcd key {key} was modified concurrently; retry")
        self.maybe_applied = maybe_applied


class AddressTaken(CalicoError):
    """An address is assigned to another workload, or a host uses it."""


class DockerUnavailable(CalicoError):
    """The Docker Engine did not answer, refused a request, or gave an unusable answer; or DOCKER_HOST is invalid."""


class DockerNotRunning(DockerUnavailable):
    """Nothing listens at the address of the Docker Engine."""


class NoSuchContainer(NotFound):
    """The Docker Engine has no container of that name or id."""


class NamespaceError(CalicoError):
    """An operation on an interface or a network namespace failed, or a path is not that of a network namespace."""
