"""The exceptions whose texts are shown to the user.

Code that calls a library converts the library's exceptions to these, since that code knows what was attempted.
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
    """Return a text with all unprintable characters escaped, except newlines."""
    if text.isprintable():  # as almost all texts, of which the agent logs many
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Return a text with all unprintable characters and newlines escaped."""
    return printable(text).replace("\n", "\\n")


def redact_userinfo(text: str) -> str:
    """Return a text with `…` instead of everything before its last '@'; in a URL, that part may contain a password.

    A text without '@' is returned unchanged.
    """
    return "…@" + text.rpartition("@")[2] if "@" in text else text


class CalicoError(Exception):
    """The base class of all errors that are shown to the user.

    `exit_status` is the exit status of a process that ends because of the error. It is 1 ("not done") unless a subclass
    sets another one.
    """

    exit_status = 1


@contextmanager
def about(what: str) -> Iterator[None]:
    """If the body of `with` raises a CalicoError, raise another one, whose text is "WHAT: " and the original text.

    `what` says what the error is about, such as the option `--ip`. The class of the new error is CalicoError itself,
    even if the original error is of a subclass.
    """
    try:
        yield
    except CalicoError as error:
        raise CalicoError(f"{what}: {error}") from None


class UsageError(CalicoError):
    """The command line does not match the grammar, or contains an invalid value.

    `usage` is the usage text to show with the error; it is empty if none is known.
    """

    exit_status = 2

    def __init__(self, why: str, usage: str = "") -> None:
        super().__init__(why)
        self.usage = usage


class NotRoot(CalicoError):
    """The command must be run as root."""

    exit_status = 2


class Failed(CalicoError):
    """An operation failed, and the process must end with `exit_status`."""

    def __init__(self, why: str, exit_status: int) -> None:
        super().__init__(why)
        self.exit_status = exit_status


class Failures(CalicoError):
    """One or more of several operations failed. `errors` are their errors, in the order of the operations.

    The exit status is that of the first error.
    """

    def __init__(self, errors: list[CalicoError]) -> None:
        super().__init__("; ".join(map(str, errors)))
        self.errors = errors
        self.exit_status = errors[0].exit_status


def for_each(things: Iterable[T], act: Callable[[T], None]) -> None:
    """Call `act` for each of `things`, also after a call has raised a CalicoError.

    If any call has raised one, raise Failures, with all of these errors, after the last call.
    """
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
    """A key of the store has an invalid value. `why` describes what is wrong with the value."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(f"etcd key {key} has an invalid value: {why}; fix or delete it")
        self.key = key
        self.why = why


class StoreError(CalicoError):
    """A request to the store failed, or the settings that select the store are invalid."""


class StoreUnavailable(StoreError):
    """No member of the store answered."""


class NoSuchApi(StoreError):
    """The etcd servers do not offer the requested API."""


class Frozen(StoreError):
    """The store must not be written at present, since its data is being moved from one API of etcd to another."""


class Fenced(StoreError):
    """A write was not made, since the key of the store's fence (datastore/store.py) has changed."""

    def __init__(self, key: str) -> None:
        super().__init__(f"etcd key {key} keeps being modified concurrently; retry")


class WatchExpired(StoreError):
    """A watch may have missed changes, so everything must be read again."""


class KeyExists(CalicoError):
    """A key that was to be created exists already."""


class HandleExists(CalicoError):
    """An IPAM handle exists that was assumed not to exist (handles.KnownHandle). Nothing was written."""

    def __init__(self, key: str) -> None:
        super().__init__(f"etcd key {key} exists already")


class CompareFailed(CalicoError):
    """A conditional write failed, since the key was changed or deleted after it had been read.

    `maybe_applied` is true if an earlier, unanswered attempt of the same write may have been applied before another
    writer changed the key.
    """

    def __init__(self, key: str, maybe_applied: bool = False) -> None:
        super().__init__(f"etcd key {key} was modified concurrently; retry")
        self.maybe_applied = maybe_applied


class AddressTaken(CalicoError):
    """An address is assigned to another workload, or is in use by a host or a server (datastore/reserved.py)."""


class DockerUnavailable(CalicoError):
    """The Docker Engine did not answer, refused a request, or gave an unusable answer; or DOCKER_HOST is invalid."""


class DockerNotRunning(DockerUnavailable):
    """Nothing listens at the address of the Docker Engine."""


class NoSuchContainer(NotFound):
    """The Docker Engine has no container with that name or id."""


class NoSuchImage(NotFound):
    """The Docker Engine does not have the image, for example because it was removed while a container of it runs."""


class NamespaceError(CalicoError):
    """An operation on a network namespace or an interface failed, or a path does not lead to a network namespace."""
