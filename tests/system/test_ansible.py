"""The example for Ansible in docs/configuration.md, in a playbook on a host that reaches etcd."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tests.system.support import CALICOCTL, Host, Result, run

ROOT = Path(__file__).parent.parent.parent
TASK = re.search(r"```yaml\n(- name: Calico.*?)```", (ROOT / "docs/configuration.md").read_text(), re.DOTALL)


def tally(done: Result) -> dict[str, int]:
    """Return how many tasks were changed, failed and so on."""
    return {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", done.out.partition("PLAY RECAP")[2])}


def test_the_example_applies_what_differs_and_reports_it(host: Host, tmp_path: Path) -> None:
    assert TASK is not None
    tasks = "".join(f"    {line}\n" for line in TASK[1].splitlines())
    (tmp_path / "play.yaml").write_text(f"- hosts: localhost\n  gather_facts: false\n  tasks:\n{tasks}")
    environment = {
        **host.environment(),
        "HOME": str(tmp_path),
        "PATH": f"{Path(CALICOCTL).parent}:{os.environ['PATH']}",
    }

    def play(*options: str) -> Result:
        command = ("ansible-playbook", "--inventory=localhost,", "--connection=local", *options, "play.yaml")
        return run(*command, check=False, cwd=tmp_path, env=environment)

    network = tmp_path / "network.yaml"
    network.write_text("profiles:\n  web:\n    tags: [front]\n    inbound: [allow tcp to ports 80]\n")
    done = play("--check")
    assert done.status == 0 and tally(done)["changed"] == 1, done
    assert host.etcd.get("/calico/v1/policy/profile/web/tags") is None, "it only says what it would change"
    done = play()
    assert done.status == 0 and tally(done)["changed"] == 1, done
    assert host.etcd.get("/calico/v1/policy/profile/web/tags") == '["front"]'
    done = play()
    assert done.status == 0 and tally(done)["changed"] == 0 and tally(done)["ok"] == 1, done
    network.write_text("profiles:\n  web:\n    tag: [front]\n")
    done = play()
    assert done.status != 0 and tally(done)["failed"] == 1 and "it can have" in done.out, done
