"""From which MACs a host sends: what the kernel's interfaces come to."""

from __future__ import annotations

import pytest

from calicoctl import netlink
from calicoctl.netlink import Device
from calicoctl.workloads import host_network

DEVICES = {
    1: Device("lo", "", frozenset()),
    2: Device("bond0", "bond", frozenset(["02:00:00:00:00:02"])),
    3: Device("br0", "bridge", frozenset(["02:00:00:00:00:03"])),
    4: Device("docker0", "bridge", frozenset(["02:00:00:00:00:04"])),
    5: Device("cali5", "veth", frozenset(["ee:ee:ee:ee:ee:ee"])),
}
MEMBERS = [Device("eth0", "", frozenset(["02:00:00:00:00:21"])), Device("eth1", "", frozenset(["02:00:00:00:00:22"]))]


def test_a_bond_sends_from_the_macs_of_its_members_and_a_bridge_counts_only_if_it_leads_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def device(index: int) -> Device:
        if index not in DEVICES:
            raise OSError
        return DEVICES[index]

    monkeypatch.setattr(netlink, "device", device)
    monkeypatch.setattr(netlink, "devices_below", {2: MEMBERS}.__getitem__)
    found = host_network._macs({1, 2, 4, 5, 99}, frozenset({2, 3}))
    bond = {"02:00:00:00:00:02", "02:00:00:00:00:21", "02:00:00:00:00:22"}
    assert found == {"bond0": bond, "br0": {"02:00:00:00:00:03"}}
