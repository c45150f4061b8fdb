"""One host and one store, whoever runs a command: the file of settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.agent import A4, LOG_DIR, AgentHost
from tests.system.support import CALICOCTL, HOST_IP, Etcd, Host, Result, run

FILE = Path("/etc/calico/node.env")
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


def bare(*words: str, by: tuple[str, ...] = (), status: int = 0, **env: str) -> Result:
    """Run calicoctl with the environment that cron, or sudo, leaves."""
    environment = {"PATH": f"{Path(CALICOCTL).parent}:/usr/bin:/bin:/usr/sbin:/sbin", **env}
    done = run(*by, CALICOCTL, *words, check=False, env=environment)
    assert "Traceback" not in done.err and done.status == status, done
    return done


@pytest.fixture
def elsewhere(own_etcd: Etcd) -> Iterator[Etcd]:
    """A store that only the file of settings tells of."""
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(f'# of this host\nETCD_AUTHORITY="127.0.0.1:{own_etcd.port}"\nHOSTNAME=host7\n')
    yield own_etcd
    FILE.unlink(missing_ok=True)


def test_everybody_sees_the_host_and_the_store_of_the_file(bare_host: Host, elsewhere: Etcd) -> None:
    bare("node", f"--ip={HOST_IP}", f"--log-dir={LOG_DIR}")
    run("ip", "netns", "add", "a")
    bare("container", "add", "/var/run/netns/a", A4, "--wait=20")  # so the agent looks there, too
    assert {key.split("/")[4] for key in elsewhere.tree("/calico/v1/host")} == {"host7"}
    bare("profile", "add", "web", by=NOBODY)
    assert elsewhere.get("/calico/v1/policy/profile/web/tags") == '["web"]'
    # what the environment says goes before, and where it names a store, nothing of the file's is mixed in
    assert bare("profile", "show", "--output=json", ETCD_AUTHORITY=f"127.0.0.1:{bare_host.etcd.port}").out == "[]\n"
    assert "127.0.0.1:1 " in bare("pool", "show", status=1, ETCD_ENDPOINTS="http://127.0.0.1:1").err
    bare("node", "stop", HOSTNAME="host8", status=1)
    bare("node", "remove", "--remove-endpoints")
    assert bare_host.etcd.tree() == {}


def test_a_file_that_cannot_be_read_leads_to_no_other_store(bare_host: Host, elsewhere: Etcd) -> None:
    FILE.chmod(0o600)
    before = bare_host.etcd.tree(), elsewhere.tree()
    said = bare("profile", "add", "web", by=NOBODY, status=1)
    assert said.out == "" and said.err.count("\n") == 1
    assert f"{FILE}, which says" in said.err and "Permission denied" in said.err and "sudo" in said.err
    assert bare("--version", by=NOBODY).out and bare("pool", "--help", by=NOBODY).out
    FILE.chmod(0o644)
    FILE.write_text(f"export ETCD_AUTHORITY=127.0.0.1:{elsewhere.port}\n")
    said = bare("profile", "add", "web", status=1)
    assert said.err.startswith(f"{FILE}, line 1: 'export ETCD_AUTHORITY' is not the name of a variable")
    assert (bare_host.etcd.tree(), elsewhere.tree()) == before
    bare("profile", "add", "web", CALICO_ENV_FILE=os.devnull)
    assert bare_host.etcd.get("/calico/v1/policy/profile/web/tags") == '["web"]'


def test_a_test_host_has_a_file_of_its_own(bare_host: Host, elsewhere: Etcd, tmp_path: Path) -> None:
    (tmp_path / "node.env").write_text(f"ETCD_AUTHORITY=127.0.0.1:{bare_host.etcd.port}\nHOSTNAME=host1\n")
    host = AgentHost(bare_host.etcd)
    done = run(
        *(CALICOCTL, "node", f"--ip={HOST_IP}", f"--log-dir={LOG_DIR}"),
        env={"PATH": os.environ["PATH"], "CALICO_ENV_FILE": "node.env"},
        cwd=tmp_path,
    )
    assert "Host host1 is registered" in done.out and elsewhere.tree() == {}
    assert host.status()["running"]
