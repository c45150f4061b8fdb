"""The settings file, which gives every user's commands the same host and store, and the local etcd's lines in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.agent import A4, LOG_DIR, AgentHost
from tests.system.support import (
    CALICOCTL,
    HOST_IP,
    Etcd,
    Host,
    Result,
    calico_links,
    end_process,
    gone,
    run,
    wait_for,
)

pytestmark = pytest.mark.api("etcdv3")

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
    store = f'ETCD_AUTHORITY="127.0.0.1:{own_etcd.port}"\n'
    FILE.write_text(f"# of this host\n{store}HOSTNAME=host7\n")
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
    another = {"ETCD_AUTHORITY": f"127.0.0.1:{bare_host.etcd.port}"}
    assert bare("profile", "show", "--output=json", **another).out == "[]\n"
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
    bare("profile", "add", "web", CALICO_ENV_FILE=os.devnull, ETCD_AUTHORITY=f"127.0.0.1:{bare_host.etcd.port}")
    assert bare_host.etcd.get("/calico/v1/policy/profile/web/tags") == '["web"]'


def test_a_test_host_has_a_file_of_its_own(bare_host: Host, elsewhere: Etcd, tmp_path: Path) -> None:
    store = f"ETCD_AUTHORITY=127.0.0.1:{bare_host.etcd.port}\n"
    (tmp_path / "node.env").write_text(f"{store}HOSTNAME=host1\n")
    host = AgentHost(bare_host.etcd)
    done = run(
        *(CALICOCTL, "node", f"--ip={HOST_IP}", f"--log-dir={LOG_DIR}"),
        env={"PATH": os.environ["PATH"], "CALICO_ENV_FILE": "node.env"},
        cwd=tmp_path,
    )
    assert "Host host1 is registered" in done.out and elsewhere.tree() == {}
    assert host.status()["running"]


# the local etcd

NODE = ("node", f"--ip={HOST_IP}", f"--log-dir={LOG_DIR}")
OWN_NAME = os.uname().nodename
PID_FILE = Path(f"/run/calico/{OWN_NAME}/etcd.pid")


class StockEtcd:
    """The etcd that Debian's package etcd-server starts, with what its unit reads."""

    def __init__(self, directory: Path) -> None:
        self.process: subprocess.Popen | None = None
        self.directory = directory

    def start(self) -> None:
        environment = {"PATH": os.environ["PATH"], "ETCD_NAME": "vm", "ETCD_DATA_DIR": str(self.directory / "data")}
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(["etcd"], env=environment, stdout=log, stderr=log)
        wait_for(lambda: run("curl", "-sf", "http://127.0.0.1:2379/health", check=False).status == 0, "etcd")

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()


@pytest.fixture
def stock(bare_host: Host, tmp_path: Path) -> Iterator[StockEtcd]:
    """A stock Debian host: its etcd has etcd's own port, and its v3 API alone."""
    bare_host.etcd.stop()
    server = StockEtcd(tmp_path)
    server.start()
    yield server
    if PID_FILE.exists():
        end_process(PID_FILE.parent / "felix.pid")
        end_process(PID_FILE)
    server.stop()
    bare_host.etcd.start()
    bare_host.etcd.await_ready()
    for folder in (Path("/var/lib/calico"), FILE.parent):
        shutil.rmtree(folder, ignore_errors=True)


def listens(port: int) -> bool:
    """Return whether somebody has a port of 127.0.0.1."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def local_etcd_row() -> dict:
    found = json.loads(bare("checksystem", "--output=json", status=0).out)
    return next(check for check in found if check["name"] == "local etcd")


def test_a_stock_host_has_an_etcd_that_serves(stock: StockEtcd) -> None:
    bare(*NODE)
    checked = {row["name"]: row["found"] for row in json.loads(bare("checksystem", "--output=json").out)}
    assert checked["local etcd"] == "none, for the host agent runs without one"
    assert re.fullmatch(r"version 3\.\S+, its v3 API: /calico/v1/Ready is true in v3 alone", checked["use of etcd"])
    bare("node", "remove")


def test_a_local_etcd_is_found_and_stays_in_use(stock: StockEtcd) -> None:
    assert "http://127.0.0.1:2389" in bare("checksystem").out
    done = bare(*NODE, "--local-etcd").out
    assert "A local etcd is running at http://127.0.0.1:2389." in done and str(FILE) in done
    assert FILE.stat().st_mode & 0o777 == 0o644
    assert local_etcd_row()["found"].startswith("runs at http://127.0.0.1:2389 ")
    run("ip", "netns", "add", "a")
    bare("container", "add", "/var/run/netns/a", A4, "--wait=20")
    assert A4 in bare("endpoint", "show", "--detailed", "--output=json", by=NOBODY).out
    written = FILE.read_text()
    assert str(FILE) not in bare(*NODE, "--local-etcd").out and FILE.read_text() == written
    said = bare(*NODE, "--local-etcd", status=1, ETCD_AUTHORITY="127.0.0.1:2399").err
    assert "is running at http://127.0.0.1:2389, and ETCD_AUTHORITY" in said and "http://127.0.0.1:2399" in said

    # after a reboot, as systemd calls it: with what the file says in the environment, too
    bare("node", "stop", "--force")
    said = bare("pool", "show", status=1).err
    assert "http://127.0.0.1:2389 (connection refused)" in said and "'calicoctl node --local-etcd'" in said
    with socket.create_server(("127.0.0.1", 2389)):
        done = bare(*NODE, "--local-etcd", ETCD_AUTHORITY="127.0.0.1:2389").out
    assert "A local etcd is running at http://127.0.0.1:2399." in done
    assert "ETCD_AUTHORITY=127.0.0.1:2399\n" in FILE.read_text() and FILE.read_text().count("ETCD") == 1
    assert A4 in bare("endpoint", "show", "--detailed", "--output=json").out
    run("ip", "netns", "add", "b")
    bare("container", "add", "/var/run/netns/b", "ipv4", "--wait=20")  # the agent goes by the new port

    # an agent that runs knows no other place
    etcd = int(PID_FILE.read_text())
    agent = int((PID_FILE.parent / "felix.pid").read_text().split()[0])
    os.kill(agent, 19)
    try:
        os.kill(etcd, 9)
        wait_for(lambda: not listens(2399), "the end of all of etcd's threads")
        with socket.create_server(("127.0.0.1", 2399)):
            said = bare(*NODE, "--local-etcd", status=1).err
            assert "port 2399 of 127.0.0.1 is in use by another program" in said and "node stop --force" in said
        assert "ETCD_AUTHORITY=127.0.0.1:2399\n" in FILE.read_text()
    finally:
        os.kill(agent, 18)
    bare(*NODE, "--local-etcd")
    bare("node", "remove", "--remove-endpoints")
    assert not FILE.parent.exists() and not calico_links() and not PID_FILE.exists()


def test_the_local_etcd_has_v3_alone_unless_its_data_is_in_v2(stock: StockEtcd) -> None:
    def command_line() -> list[str]:
        return Path(f"/proc/{PID_FILE.read_text().strip()}/cmdline").read_text().split("\0")

    v2 = {"DATASTORE_TYPE": "etcdv2"}
    # as an older version has made it
    bare(*NODE, "--local-etcd", **v2)
    there = re.search(r"^ETCD_AUTHORITY=(.*)$", FILE.read_text(), re.MULTILINE)
    assert there is not None
    bare("profile", "add", "web", ETCD_AUTHORITY=there[1], **v2)
    bare("node", "stop", "--force")
    bare(*NODE, "--local-etcd")
    assert bare("profile", "show", "--output=json").out == '[\n  {\n    "name": "web"\n  }\n]\n'
    for option in ("--enable-v2", "--auto-compaction-mode=periodic", "--auto-compaction-retention=1h"):
        assert option in command_line()
    assert "its v2 API: /calico/v1/Ready is true in v2 alone" in bare("checksystem", "--output=json").out
    said = bare("status", by=NOBODY).out
    assert "the local etcd has its data in etcd's v2 API" in said and "'calicoctl datastore migrate'" in said
    bare("node", "remove")
    # what etcd 3.6 would say to such data
    newer = Path("/run/newer")
    newer.mkdir()
    (newer / "etcd").write_text("#!/bin/sh\necho etcd Version: 3.6.1\n")
    (newer / "etcd").chmod(0o755)
    said = bare(*NODE, "--local-etcd", PATH=f"{newer}:{Path(CALICOCTL).parent}:/usr/bin:/bin", status=1).err
    assert "/var/lib/calico/etcd is of etcd's v2 API, which etcd 3.6 does not have: install etcd 3.4 or 3.5" in said
    shutil.rmtree(newer)

    # the move ends with an etcd that serves v3 alone
    bare(*NODE, "--local-etcd")
    bare("datastore", "migrate")
    assert "--enable-v2" in command_line()
    assert "must be run as root" in bare("datastore", "migrate", "--finish", by=NOBODY, status=2).err
    said = bare("datastore", "migrate", "--finish").out
    assert said.endswith("The local etcd was started again, and serves v3 alone.\n")
    assert "--enable-v2" not in command_line()
    assert bare("profile", "show", "--output=json").out == '[\n  {\n    "name": "web"\n  }\n]\n'
    assert bare("datastore", "migrate", "--finish").out == "etcd does not serve its v2 API any more.\n"
    environment = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin"}
    wait_for(lambda: "Problems:   none" in run(CALICOCTL, "status", check=False, env=environment).out, "the agent")
    bare("node", "remove")

    shutil.rmtree("/var/lib/calico/etcd")
    bare(*NODE, "--local-etcd")
    assert "--enable-v2" not in command_line() and "--auto-compaction-retention=1h" in command_line()
    assert "Problems:   none" in bare("status").out
    bare("profile", "add", "db")
    os.kill(int(PID_FILE.read_text()), 9)
    bare("node", "stop", "--force")
    bare(*NODE, "--local-etcd")
    assert "db" in bare("profile", "show").out and "--enable-v2" not in command_line()
    bare("node", "remove")


def test_the_local_etcd_keeps_to_its_own_lines(stock: StockEtcd) -> None:
    FILE.parent.mkdir()
    mine = "# mine\nHOSTNAME=host7\nCALICO_NODE_OPTIONS=--local-etcd \\\n"
    FILE.write_text("ETCD_ENDPOINTS=http://192.0.2.9:2379\n" + mine)
    before = FILE.read_text()
    for environment in ({}, {"ETCD_AUTHORITY": "127.0.0.1:2399"}):
        said = bare(*NODE, "--local-etcd", status=1, **environment).err
        assert "http://192.0.2.9:2379" in said and str(FILE) in said
    assert FILE.read_text() == before and not Path("/var/lib/calico").exists()
    FILE.write_text(mine)
    FILE.chmod(0o640)
    # what fails leaves no etcd behind that nobody looks after
    said = bare(*NODE, "--local-etcd", status=1, CALICO_ENV_FILE="/proc/nosuch/node.env").err
    assert "/proc/nosuch/node.env cannot be written" in said and not PID_FILE.exists()
    log = LOG_DIR / "felix.log"
    log.unlink(missing_ok=True)
    log.mkdir(parents=True)  # so the agent cannot start
    bare(*NODE, "--local-etcd", "--detach=false", status=1)
    log.rmdir()
    assert not Path("/run/calico/host7/etcd.pid").exists()
    bare(*NODE, "--local-etcd")
    assert FILE.read_text().endswith(mine) and FILE.stat().st_mode & 0o777 == 0o640
    bare("node", "remove")
    assert FILE.read_text() == mine and FILE.stat().st_mode & 0o777 == 0o640


def test_the_local_etcd_ends_with_its_agent_and_its_lines_go_whatever_store_is_named_later(
    stock: StockEtcd, own_etcd: Etcd
) -> None:
    other = f"ETCD_ENDPOINTS=http://127.0.0.1:{own_etcd.port}\n"
    bare(*NODE, "--local-etcd")
    etcd = int(PID_FILE.read_text())
    with FILE.open("a") as file:  # the host is to have another store
        file.write("ETCD_ENDPOINTS=http://192.0.2.99:2379\n")
    assert "The local etcd has ended." in bare("node", "stop", "--force").out
    assert gone(etcd) and not PID_FILE.exists()
    FILE.write_text(FILE.read_text().replace("ETCD_ENDPOINTS=http://192.0.2.99:2379\n", other))
    bare(*NODE)
    bare("node", "remove")
    assert FILE.read_text() == other and own_etcd.tree("/calico/v1/host") == {}
    FILE.unlink()
    # where the environment names another one for a single command
    bare(*NODE, "--local-etcd")
    etcd = int(PID_FILE.read_text())
    bare("node", "remove", ETCD_AUTHORITY=f"127.0.0.1:{own_etcd.port}")
    assert gone(etcd) and not FILE.exists()
    # the lines of a host whose etcd does not run are no concern of others, unlike the tables, which nobody uses
    bare(*NODE, "--local-etcd")
    bare("node", "stop", "--force")
    bare("node", "remove", HOSTNAME="host8", ETCD_AUTHORITY=f"127.0.0.1:{own_etcd.port}")
    assert FILE.exists()
    bare("node", "remove")
