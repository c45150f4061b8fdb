"""The errors of this program. Each carries the sentence that the user reads; only `cli/main.py` prints them.

A library's error becomes one of these at the place that calls the library, where it is known what was wanted and
what the user can do about it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Callable, TypeVar

T = TypeVar("T")


_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


def is_shortage(error: BaseException | None) -> bool:
    """Tell whether something failed for want of descriptors or memory, whatever became of the error since."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _SHORTAGES):
            return True
        error = error.__cause__ or error.__context__
    return False


def printable(text: str) -> str:
    """Return a text that is safe on a terminal: control characters, which etcd may hold, are spelled out."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Return a text that is safe on a terminal, and one line whatever is in it."""
    return printable(text).replace("\n", "\\n")


def redact_userinfo(text: str) -> str:
    """Return an address without what stands before an @, a password perhaps: messages end in logs."""
    return "…@" + text.rpartition("@")[2] if "@" in text else text


class CalicoError(Exception):
    """The root of all errors that a user may meet: the text is one line for them.

    `exit_status` is what the process ends with: 1, "not done", unless a kind says otherwise.
    """

    exit_status = 1


@contextmanager
def about(option: str) -> Iterator[None]:
    """Put the name of the option that a sentence is about before it."""
    try:
        yield
    except CalicoError as error:
        raise CalicoError(f"{option}: {error}") from None


class UsageError(CalicoError):
    """The words on the command line do not fit the grammar, which `usage` shows."""

    exit_status = 2

    def __init__(self, why: str, usage: str = "") -> None:
        super().__init__(why)
        self.usage = usage


class NotRoot(CalicoError):
    """The command needs root."""

    exit_status = 2


class Failed(CalicoError):
    """Something that was asked to be run failed, with this exit status."""

    def __init__(self, why: str, exit_status: int) -> None:
        super().__init__(why)
        self.exit_status = exit_status


class Failures(CalicoError):
    """Some of several things could not be done, each for a reason of its own."""

    def __init__(self, errors: list[CalicoError]) -> None:
        super().__init__("; ".join(map(str, errors)))
        self.errors = errors
        self.exit_status = errors[0].exit_status


def for_each(things: Iterable[T], act: Callable[[T], None]) -> None:
    """Call `act` for each thing; one that fails keeps no other from its turn. Raises Failures when they are done."""
    errors: list[CalicoError] = []
    for thing in things:
        try:
            act(thing)
        except CalicoError as error:
            errors.append(error)
    if errors:
        raise Failures(errors)


class NotFound(CalicoError):
    """What was to be removed, shown or changed does not exist."""


class Conflict(CalicoError):
    """Somebody else changed the same thing again and again, or holds what was asked for."""


class InvalidValue(CalicoError):
    """A key of the store holds something that cannot be understood. Names the key."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(f"etcd key {key} has an invalid value: {why}; fix or delete it")
        self.key = key
        self.why = why


class StoreError(CalicoError):
    """The store refused a request, or is configured wrongly."""


class StoreUnavailable(StoreError):
    """No member of the store answered."""


class WatchExpired(StoreError):
    """A watch cannot tell all changes any more, such as those the store does not remember: read all anew."""


class KeyExists(CalicoError):
    """A create-only write met a key that is there already."""


class CompareFailed(CalicoError):
    """A compare-and-swap found another value than the one that was read.

    `maybe_applied` is true when an earlier, unanswered attempt of the same write may have been applied before
    somebody else's write came on top of it.
    """

    def __init__(self, key: str, maybe_applied: bool = False) -> None:
        super().__init__(f"etcd key {key} was modified concurrently; retry")
        self.maybe_applied = maybe_applied


class AddressTaken(CalicoError):
    """The address asked for belongs to somebody else."""


class DockerUnavailable(CalicoError):
    """The Docker Engine could not be asked."""


class DockerNotRunning(DockerUnavailable):
    """Nothing listens where the Docker Engine would."""


class NoSuchContainer(NotFound):
    """The Docker Engine knows no container of that name."""


class NamespaceError(CalicoError):
    """The kernel refused what was to be done to an interface or a namespace."""
