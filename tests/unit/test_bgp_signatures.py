"""What the kernel's counters of packets with a wrong signature say about sessions that are not up."""

from __future__ import annotations

from pathlib import Path

import pytest

from calicoctl.felix.bgp.signatures import RECENT, Signatures, counters

NAMES = ("TCPMD5NotFound", "TCPMD5Unexpected", "TCPMD5Failure")


class Kernel:
    """The counters, and the time."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(NAMES, 5)
        self.now = 0.0

    def netstat(self) -> str:
        names, values = " ".join(self.counts), " ".join(map(str, self.counts.values()))
        return f"TcpExt: SyncookiesSent {names} X\nTcpExt: 0 {values} 7\nIpExt: InNoRoutes\nIpExt: 3\n"


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


def signatures(kernel: Kernel) -> Signatures:
    return Signatures(kernel.netstat, lambda: kernel.now)


@pytest.mark.parametrize(
    ("counter", "has_password", "words"),
    [
        ("TCPMD5NotFound", True, "no password for this host"),
        ("TCPMD5Unexpected", False, "this host has none for it"),
        ("TCPMD5Failure", True, "another password"),
    ],
)
def test_a_counter_that_grows_is_about_sessions_with_or_without_a_password(
    kernel: Kernel, counter: str, has_password: bool, words: str
) -> None:
    found = signatures(kernel)
    found.update()
    assert found.suspicion(True) is found.suspicion(False) is None, "what was counted before does not matter"
    kernel.counts[counter] += 1
    found.update()
    assert words in found.suspicion(has_password) and found.suspicion(not has_password) is None
    kernel.now += RECENT
    found.update()
    assert words in found.suspicion(has_password)
    kernel.now += 1
    found.update()
    assert found.suspicion(has_password) is None, "long ago"


def test_what_cannot_be_read_says_nothing(kernel: Kernel) -> None:
    texts = iter(["nonsense", kernel.netstat(), "", kernel.netstat().replace(" 5 ", " 6 ")])
    found = Signatures(lambda: next(texts), lambda: 0.0)
    for _ in range(3):
        found.update()
        assert found.suspicion(True) is None
    found.update()
    assert found.suspicion(True)


def test_this_kernel_has_the_counters() -> None:
    assert set(counters(Path("/proc/net/netstat").read_text())) == set(NAMES)
