"""Many commands at once."""

from __future__ import annotations

from tests.system.support import Host, links, run


def test_fifty_processes_on_three_hosts_get_fifty_addresses(host: Host) -> None:
    hosts = [Host(host.etcd, f"host{number}") for number in (1, 2, 3)]
    for one in hosts:
        one.register()
    spaces = [f"space{number}" for number in range(50)]
    for space in spaces:
        run("ip", "netns", "add", space)

    def on_all(*words: str) -> list[str]:
        running = [
            hosts[number % 3].start("container", *(word.format(f"/var/run/netns/{space}") for word in words))
            for number, space in enumerate(spaces)
        ]
        outcomes = [command.communicate(timeout=300) for command in running]
        failed = [outcome for outcome, command in zip(outcomes, running) if command.returncode]
        assert not failed
        return [out for out, _ in outcomes]

    given = [out.split()[1] for out in on_all("add", "{}", "ipv4")]
    assert len(set(given)) == 50
    assert set(host.allocations()) == set(given)
    host.check_consistent()
    for space, address in zip(spaces, given):
        assert links(space)["eth1"]["addr_info"][0]["local"] == address
    blocks = host.etcd.tree("/calico/ipam/v2/assignment")
    assert len(blocks) == 3, "one block a host"
    on_all("remove", "{}")
    host.check_nothing_left()
    assert host.allocations() == {}


def test_two_commands_for_one_workload_one_wins(host: Host, blue: str) -> None:
    for _ in range(5):
        running = [host.start("container", "add", blue, "ipv4") for _ in range(3)]
        outcomes = sorted((command.wait(), command.stderr.read()) for command in running)
        assert [status for status, _ in outcomes] == [0, 1, 1]
        assert all("already been configured" in error for _, error in outcomes[1:])
        host.check_consistent()
        running = [host.start("container", "remove", blue) for _ in range(3)]
        assert sorted(command.wait() for command in running) == [0, 1, 1]
        host.check_nothing_left()


def test_two_commands_for_one_address_one_wins(host: Host) -> None:
    spaces = [f"/var/run/netns/s{number}" for number in range(4)]
    for space in spaces:
        run("ip", "netns", "add", space.rpartition("/")[2])
    running = [host.start("container", "add", space, "192.168.0.9") for space in spaces]
    assert sorted(command.wait() for command in running) == [0, 1, 1, 1]
    host.check_consistent()


def test_a_lock_that_is_held_is_waited_for(host: Host, blue: str) -> None:
    run("mkdir", "-p", "/run/calico/host1")
    lock = "/run/calico/host1/namespace.-var-run-netns-blue"
    holder = run("sh", "-c", f"flock {lock} sleep 2 >/dev/null 2>&1 & echo $!")
    assert holder.status == 0
    host.ctl("container", "add", blue, "ipv4")
    host.check_consistent()
