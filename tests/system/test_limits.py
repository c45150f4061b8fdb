"""Keys that are too deep, and records that are too long: named, and nobody else's matter. With a running agent."""

from __future__ import annotations

from tests.system.agent import ALLOW, AgentHost
from tests.system.support import run, wait_for


def test_keys_without_end_cost_nobody_else_anything(pair: AgentHost) -> None:
    """A key 600 levels deep, an endpoint with 20,000 profiles, one with 5,000 addresses, a profile with 6,000 rules."""
    deep = "/calico/v1/policy/profile" + "/deep" * 600
    pair.etcd.put(deep, "x")
    folder = f"/calico/v1/host/{pair.name}/workload/docker/x/endpoint"
    record = {"mac": "02:00:00:00:00:09", "state": "active"}
    pair.etcd.put(f"{folder}/1", {**record, "profile_ids": [f"p{number}" for number in range(20_000)]})
    nets = [f"192.168.{100 + number // 256}.{number % 256}/32" for number in range(5_000)]
    pair.etcd.put(f"{folder}/2", {**record, "ipv4_nets": nets})
    pair.profile("long", [ALLOW] * 6_000)
    pair.profile("web", [ALLOW, {"action": "deny", "protocol": "tcp", "dst_ports": [7001]}])

    def is_in_kernel(port: int) -> bool:
        return str(port) in run("nft", "list", "chain", "inet", "calico", "inbound/web").out

    wait_for(lambda: is_in_kernel(7001), pair.log())
    for number, what in ((1, "64 profiles"), (2, "256 addresses")):
        status = wait_for(lambda n=number: pair.endpoint_status(f"{folder}/{n}"), pair.log())
        assert status["status"] == "error" and what in status["reason"]

    def reported() -> dict[str, str]:
        return {item["key"]: item["problem"] for item in pair.status()["problems"]}

    def long() -> str:
        return reported().get("/calico/v1/policy/profile/long/rules", "")

    wait_for(lambda: "5000 rules" in long(), pair.log())
    pair.kill_agent()
    pair.start_agent()  # which reads all of that
    pair.profile("web", [ALLOW, {"action": "deny", "protocol": "tcp", "dst_ports": [7002]}])
    wait_for(lambda: is_in_kernel(7002), pair.log())
    assert any(key.startswith(deep[:60]) and "levels" in why for key, why in reported().items())
    for words in (
        "ipam check",
        "profile show --detailed",
        "endpoint show",
        "pool show",
        "status",
        "profile web rule show",
    ):
        pair.ctl(*words.split(), status=None)
    assert pair.ctl("profile", "show").out.count("web") == 1
