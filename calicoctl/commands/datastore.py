"""Show which store is used, and move the data from etcd's v2 API to its v3 API.

Usage:
  calicoctl datastore show [--output=<FORMAT>]
  calicoctl datastore migrate
  calicoctl datastore migrate --rollback [--discard]
  calicoctl datastore migrate --finish [--discard]

Options:
  --rollback             go back to v2, as long as its data is not deleted
  --finish               delete the data in v2, which then cannot be gone back
                         to
  --discard              with --rollback, even if this loses what was written
                         to v3 since the move; with --finish, even if this
                         loses what old programs have written to v2 since then
  -o, --output=<FORMAT>  json or yaml: an object; default: text

The v2 and the v3 API of etcd have keys of their own. `show` says which of the
two is used and why, whether its data is frozen, what each of them holds,
whether users are switched on there, and for each member of the cluster
whether it is healthy, its version, whether it is the leader, and the size of
its database. It works while a member is down, too, and needs no permissions
but those for /calico/. JSON: used (null if no API can be), why, frozen,
error, move (copying or rolling back, if the data is frozen for that), advice,
apis (v2 and v3: served, ready, keys, bytes, users, error) and members (url,
healthy, version, leader, size, in_use and quota in bytes, error).

`migrate` copies all data to v3, under the same keys, and takes it into use
there. Meanwhile, the data is frozen: commands that would change something are
refused, for some seconds; packets pass. Running agents go over to v3 by
themselves. Nothing is changed if v3 has data already, if an agent is of a
version that knows v2 alone, or if DATASTORE_TYPE is set. If it fails or is
interrupted, v2 is in use as before; after a kill -9, the data may stay frozen
until `migrate`, which continues, or `migrate --rollback` is run. The data in
v2 stays as it was, frozen, until `migrate --finish`, which must be run as
root where the data is in the local etcd: this is started again, for v3 alone.
The exit status is 1 if the data has moved, but something is left to be done.

Examples:
  calicoctl datastore show
  sudo calicoctl datastore migrate
  sudo calicoctl datastore migrate --finish
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Callable

from calicoctl.datastore import cluster, keys
from calicoctl.datastore.backends import PATIENCE, Backends
from calicoctl.datastore.detection import Choice
from calicoctl.datastore.hosts import hostname
from calicoctl.datastore.migration import move
from calicoctl.datastore.migration_after import finish, roll_back
from calicoctl.datastore.migration_run import Run
from calicoctl.datastore.migration_state import Moved, State
from calicoctl.datastore.settings import TYPE, V2, V3, EtcdSettings
from calicoctl.datastore.store import Store, each_below
from calicoctl.errors import CalicoError, InvalidValue, NoSuchApi, StoreError, one_line
from calicoctl.felix import local_etcd, process
from calicoctl.grammar import Prepared, parse, require_root
from calicoctl.output import data_format, print_data, print_table

SHOW_PATIENCE = 3.0
"""Seconds for which `show` repeats a request that members do not answer; users call it if something is wrong."""


def prepare(argv: list[str]) -> Prepared:
    arguments = parse(str(__doc__), argv)
    if arguments["show"]:
        return partial(_show, data_format(arguments))
    if arguments["--rollback"]:
        return partial(_migrate, lambda run: roll_back(run, arguments["--discard"]))
    if arguments["--finish"]:
        return partial(_finish, arguments["--discard"])
    return partial(_migrate, move)


class Progress:
    """Prints the progress of a move to standard error.

    On a terminal, one line changes with the progress; elsewhere, one line is printed for each step.
    """

    def __init__(self) -> None:
        self._on_terminal = sys.stderr.isatty()
        self._last = ""

    def tell(self, text: str) -> None:
        text = one_line(text)
        if self._on_terminal:
            print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)
        elif text.partition(":")[0] != self._last.partition(":")[0]:  # the same step, with another count
            print(f"{text} …", file=sys.stderr)
        self._last = text

    def end(self) -> None:
        if self._on_terminal and self._last:
            print(file=sys.stderr)


def _migrate(act: Callable[[Run], Moved]) -> None:
    settings = EtcdSettings.from_environment()
    if settings.api is not None:
        raise CalicoError(
            f"{TYPE} is set to {settings.api}, so commands here use that API whatever is in etcd: remove it, from "
            "/etc/calico/node.env, too"
        )
    progress = Progress()

    def open() -> tuple[Store, Store]:
        backends = Backends(settings, PATIENCE)
        return backends.open(V2), backends.open(V3)

    try:
        moved = act(Run(settings.urls, open, progress.tell))
    finally:
        progress.end()
    print(moved.text)
    if moved.problems:
        raise CalicoError("; ".join(moved.problems) + ".")


def _finish(discard: bool) -> None:
    host = hostname()
    has_v2 = local_etcd.serves_v2(host) and local_etcd.is_named(host, EtcdSettings.from_environment())
    if has_v2:
        require_root()
    _migrate(lambda run: finish(run, discard))
    if has_v2:
        local_etcd.serve_v3_alone()
        if process.running(host) is None:
            print("The local etcd serves v3 alone when it is started the next time.")
            return
        local_etcd.stop(host)  # the agent starts it again
        give_up = time.monotonic() + local_etcd.START_PATIENCE
        while not (local_etcd.running(host) and cluster.members(EtcdSettings.from_environment())[0].healthy):
            if time.monotonic() > give_up:
                raise CalicoError("The agent does not start the local etcd again: see 'calicoctl status'.")
            time.sleep(0.1)  # between two questions to a server that is starting
        print("The local etcd was started again, and serves v3 alone.")


def _show(form: str | None) -> None:
    settings = EtcdSettings.from_environment()
    members = cluster.members(settings)
    # those that do not answer are asked last, and only for what decides which API is used
    infos = list(zip(settings.members, members))
    healthy = tuple(member for member, info in infos if info.healthy)
    others = tuple(member for member, info in infos if info.version is not None and not info.healthy)
    silent = tuple(member for member in settings.members if member not in healthy + others)
    backends = Backends(replace(settings, members=healthy + others + silent), SHOW_PATIENCE)
    choice: Choice | None = None
    error: str | None = None
    try:
        choice = backends.choose(backends.choose(None))
    except (InvalidValue, StoreError) as refused:
        error = str(refused)
    settings = replace(settings, members=healthy or others)
    backends = Backends(settings, PATIENCE if healthy else SHOW_PATIENCE)
    state: State | None = None
    apis = {version: _fields(None, error or "no member answers") for version in ("v2", "v3")}
    if settings.members:
        with suppress(InvalidValue, StoreError):  # it is said above what is wrong
            state = Run(settings.urls, lambda: (backends.open(V2), backends.open(V3)), lambda text: None).state()
        for version, api, users in zip(apis, (V2, V3), cluster.users(settings)):
            apis[version] = _contents(backends, api, users)
    if form:
        print_data(
            {
                "used": None if choice is None else choice.version,
                "why": None if choice is None else choice.why,
                "frozen": None if choice is None else choice.frozen,
                "error": error,
                "move": None if state is None else state.step,
                "advice": None if state is None else state.advice,
                "apis": apis,
                "members": [asdict(member) for member in members],
            },
            form,
        )
    else:
        _print(choice, error, state, apis, members)
    if error is not None:
        raise CalicoError(error if form else "No API of etcd can be used.")


def _fields(users: bool | None, error: str | None) -> dict[str, Any]:
    """Return the fields of one API in the JSON of `show`, before the API is asked. A field is None if it is not known.

    The field "ready" is the value of the key Ready, "keys" is the number of keys below /calico, and "bytes" is the size
    of these keys and their values. The arguments become the fields of their names.
    """
    return {"served": True, "ready": None, "keys": None, "bytes": None, "users": users, "error": error}


def _contents(backends: Backends, api: str, users: bool | None) -> dict[str, Any]:
    """Ask one API, and return its fields: see `_fields`."""
    found = _fields(users, None)
    try:
        store = backends.open(api)
        ready = store.get(keys.READY)
        found["ready"] = None if ready is None else ready.value
        sizes = [len(entry.key.encode()) + len(entry.value.encode()) for entry in each_below(store, keys.ROOT)]
        found["keys"], found["bytes"] = len(sizes), sum(sizes)
    except NoSuchApi:
        found["served"] = False
    except (InvalidValue, StoreError) as error:
        found["error"] = str(error)
    return found


def _print(
    choice: Choice | None,
    error: str | None,
    state: State | None,
    apis: dict[str, Any],
    members: list[cluster.MemberInfo],
) -> None:
    if choice is None:
        print(one_line(f"Used: none: {error}"))
    else:
        print(f"Used: etcd's {choice.version} API: {choice.why}")
        print(f"Frozen: {'yes' if choice.frozen else 'no'}")
    if state is not None and state.advice is not None:
        print(state.advice)
    rows = []
    for version, found in apis.items():
        if not found["served"]:
            rows.append([version, "not served", "", "", ""])
        else:
            value = found["ready"]
            ready = found["error"] or (
                "none" if value is None else value if value in ("true", "false") else f"'{value}'"
            )
            users = {True: "on", False: "off", None: ""}[found["users"]]
            rows.append([version, ready, found["keys"], _size(found["bytes"]), users])
    print_table(["API", "Ready", "Keys", "Size", "Users"], rows, widest=50)
    print_table(
        ["Member", "State", "Version", "Leader", "Database", "In use", "Quota"],
        [
            [
                one.url,
                "healthy" if one.healthy else one.error,
                one.version,
                {True: "yes", False: "no", None: ""}[one.leader],
                _size(one.size),
                _size(one.in_use),
                _size(one.quota),
            ]
            for one in members
        ],
        widest=50,
    )


def _size(bytes: int | None) -> str:
    if bytes is None:
        return ""
    power, unit = next(
        (power, unit) for power, unit in ((30, "G"), (20, "M"), (10, "K")) if bytes >= 2**power or power == 10
    )
    return f"{bytes / 2**power:.1f} {unit}iB"
