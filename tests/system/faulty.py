"""calicoctl with an injected fault. Takes calicoctl's arguments; the environment says which fault.

FAULT=fail:N    the N-th change of etcd or the kernel (from 0) is refused
FAULT=kill:N    the process is killed with -9 right after the N-th change
FAULT=lost:N    the N-th change is made, and, if it is one of etcd's, its answer is lost
FAULT=term:N    the process gets a SIGTERM right after the N-th change
FAULT=dead:N    etcd is gone from the N-th change on
FAULT=none:0    no fault
FAULT_LOG=FILE  gets a line for each change
FAULTY=cni      runs the CNI plugin in place of calicoctl
SETTLE=SECONDS  how long `datastore migrate` waits for commands that have begun

The seams are the calls of the library for etcd's v2 API that change something, what is sent to etcd's v3 API, the
requests to the kernel that change something, and what is written to sysctls, so no step of the program can be missed.
"""

import base64
import os
import signal
import sys

from calicoctl import netlink, slim
from calicoctl.cli.main import entry
from calicoctl.datastore import etcd3_http, migration_run
from calicoctl.datastore.members import ConnectionLost, NotSent
from calicoctl.plugins import cni
from calicoctl.workloads import netns

slim.install()

import etcd  # noqa: E402
import urllib3.exceptions  # noqa: E402

MODE, _, NUMBER = os.environ["FAULT"].partition(":")
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM}
changes = 0
NO_INDEX = 2**63 - 1
"""Names no entry: with it, a write asks whether it would be allowed, and is no change."""


def count(what):
    """Note a change; tell whether it is the one with the fault."""
    global changes
    with open(os.environ["FAULT_LOG"], "a") as log:
        print(what, file=log)
    changes += 1
    return changes - 1 == int(NUMBER)


def unreachable():
    return etcd.EtcdConnectionFailed(cause=urllib3.exceptions.NewConnectionError(None, "Connection refused"))


def faulty_etcd(name):
    original = getattr(etcd.Client, name)

    def call(self, key, *arguments, **options):
        if options.get("prevIndex") == NO_INDEX:
            return original(self, key, *arguments, **options)
        hit = count(f"etcd {name} {key}")
        if MODE == "dead" and changes > int(NUMBER):
            raise unreachable()
        if hit and MODE == "fail":
            raise etcd.EtcdInsufficientPermissions("The request requires user authentication", {"errorCode": 110})
        try:
            result = original(self, key, *arguments, **options)
        finally:
            if hit and MODE in SIGNALS:
                os.kill(os.getpid(), SIGNALS[MODE])
        if hit and MODE == "lost":
            raise etcd.EtcdConnectionFailed(cause=urllib3.exceptions.ProtocolError("Connection aborted"))
        return result

    setattr(etcd.Client, name, call)


def faulty_read():
    original = etcd.Client.read

    def call(self, *arguments, **options):
        if MODE == "dead" and changes > int(NUMBER):
            raise unreachable()
        return original(self, *arguments, **options)

    etcd.Client.read = call


def faulty_v3():
    original = etcd3_http.Connection.exchange

    def call(self, method, path, body=None, seconds=None):
        if MODE == "dead" and changes > int(NUMBER):
            raise NotSent("http://127.0.0.1 (connection refused)")
        changed = changed_keys(path, body or {})
        if not changed:
            return original(self, method, path, body, seconds)
        hit = count(f"etcd {' '.join(changed)}")
        if MODE == "dead" and changes > int(NUMBER):
            raise NotSent("http://127.0.0.1 (connection refused)")
        if hit and MODE == "fail":
            raise etcd3_http.ErrorAnswer(etcd3_http.PERMISSION_DENIED, "etcdserver: permission denied")
        try:
            result = original(self, method, path, body, seconds)
        finally:
            if hit and MODE in SIGNALS:
                os.kill(os.getpid(), SIGNALS[MODE])
        if hit and MODE == "lost":
            raise ConnectionLost("http://127.0.0.1 did not answer (connection aborted)")
        return result

    etcd3_http.Connection.exchange = call


def changed_keys(path, body):
    """Return what a request of the v3 API does to which keys; nothing for one whose condition is never met."""
    if any(str(NO_INDEX) in one.values() for one in body.get("compare", ())):
        return []
    steps = [step for one in body.get("success", ()) for step in one.items() if step[0] != "request_range"]
    steps += [(path, body)] if path in ("/v3/kv/put", "/v3/kv/deleterange") else []
    return [f"{kind.rpartition('_')[2]} {base64.b64decode(one['key']).decode()}" for kind, one in steps]


def faulty_netlink():
    """Send requests one by one that the program sends together, as if the kernel carried out a part of them only."""
    original = netlink.do_together

    def call(protocol, requests):
        refused = None
        for kind, flags, body in requests:
            if kind == netlink.RTM_DELLINK:  # faulty_deletion counts it
                original(protocol, [(kind, flags, body)])
                continue
            hit = count(f"netlink {kind}")
            try:
                if hit and MODE == "fail":
                    raise OSError(105, "No buffer space available")
                original(protocol, [(kind, flags, body)])
            except OSError as error:  # the kernel carries out those after it as well
                refused = refused or error
            if hit and MODE in SIGNALS:
                os.kill(os.getpid(), SIGNALS[MODE])
        if refused:
            raise refused

    netlink.do_together = call


def faulty_deletion():
    """The program continues when an interface is gone, which is before the kernel's answer."""
    original = netns.delete_link

    def call(index):
        hit = count("netlink delete")
        if hit and MODE == "fail":
            raise OSError(105, "No buffer space available")
        original(index)
        if hit and MODE in SIGNALS:
            os.kill(os.getpid(), SIGNALS[MODE])

    netns.delete_link = call


def faulty_sysctl():
    original = netns._write_sysctl

    def call(path, value):
        hit = count(f"sysctl {path}")
        if hit and MODE == "fail":
            raise OSError(30, "Read-only file system")
        original(path, value)
        if hit and MODE in SIGNALS:
            os.kill(os.getpid(), SIGNALS[MODE])

    netns._write_sysctl = call


faulty_etcd("write")
faulty_etcd("delete")
faulty_read()
faulty_v3()
faulty_netlink()
faulty_deletion()
faulty_sysctl()
migration_run.SETTLE = float(os.environ.get("SETTLE", migration_run.SETTLE))
if os.environ.get("FAULTY") == "cni":
    cni.entry()
sys.argv = ["calicoctl", *sys.argv[1:]]
entry()
