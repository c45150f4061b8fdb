"""Show the endpoints of all hosts, change their profiles, and remove them.

Usage:
  calicoctl endpoint show [--host=<HOST>] [--orchestrator=<ORCHESTRATOR>]
      [--workload=<WORKLOAD>] [--endpoint=<ENDPOINT>]
      [--detailed | --counters] [--no-trunc] [--output=<FORMAT>]
  calicoctl endpoint <ENDPOINT_ID> profile (append|remove|set) [--host=<HOST>]
      [--orchestrator=<ORCHESTRATOR>] [--workload=<WORKLOAD>] [<PROFILES>...]
  calicoctl endpoint <ENDPOINT_ID> profile show [--host=<HOST>]
      [--orchestrator=<ORCHESTRATOR>] [--workload=<WORKLOAD>]
      [--output=<FORMAT>]
  calicoctl endpoint <ENDPOINT_ID> remove [--host=<HOST>]
      [--orchestrator=<ORCHESTRATOR>] [--workload=<WORKLOAD>]

Options:
  <ENDPOINT_ID>          an endpoint's id, or the beginning of it
  --host=<HOST>          of this host only; default: of all hosts
  --orchestrator=<ORCHESTRATOR>
                         of this orchestrator only: docker, namespace, cni, or
                         another program's, such as libnetwork; default: of
                         all
  --workload=<WORKLOAD>  of the workload with this id, or this beginning of
                         it, or of the Docker containers with this name;
                         default: of all
  --endpoint=<ENDPOINT>  the endpoint with this id, or this beginning of it;
                         default: all
  --detailed             one row per endpoint; default: counts per host
  --counters             what each endpoint of this host has sent and
                         received, and what was dropped; must be run as root
  --no-trunc             show everything on a terminal, however wide it is
  -o, --output=<FORMAT>  json or yaml: an array, with the fields of the
                         endpoints as in etcd; default: a table

A workload's id is that of its Docker container, or the path of its namespace
with every / as -. On a terminal, a Docker container is shown by its name,
where that is known, ids by their first 12 characters, and the table fits the
terminal's width. In a pipe or a file, everything is shown, a container's name
in the line below its id. The state of an active endpoint is followed by its
status unless that is up: (down), (error), or (unknown) if the agent of its
host is down or has not reported the endpoint yet. Reasons follow the table,
on standard error. JSON: status, and reason. A container of this host that
cannot be connected as its labels ask has a row with the state error, without
an endpoint's id, as long as the agent runs.
`--counters` shows what a workload has sent and received since its interface
was created, and the packets from it (outbound) and to it (inbound) that were
dropped, by reason: a rule denies them (rule), no rule matches (no-rule), a
profile is missing or invalid (profile), the sender is forged (spoofed), they
belong to no connection and start none (no-connection), the interface has no
endpoint that may be used (no-endpoint), or DefaultEndpointToHostAction is
DROP (host-action). JSON: also the fields of the endpoints as in etcd; sent,
received, dropped, since. `calicoctl drops` shows which packets they were.
Profiles are evaluated in the order of the list; `set` without profiles clears
it. `show` and `profile` need no root, and work for the endpoints of any host.
`remove` must be run as root. It removes an endpoint of this host, with its
interface and addresses, if its workload no longer exists, whichever program
has made it. The endpoint of a container or namespace that exists is refused:
use `container remove`, or `docker network disconnect`.

Examples:
  calicoctl endpoint show --detailed
  calicoctl endpoint show --host=host1 --output=json
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from typing import Any, Callable

from calicoctl import clock
from calicoctl.addresses import host_net, pack
from calicoctl.datastore import keys
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.hosts import check_hostname
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Endpoint
from calicoctl.errors import CalicoError, InvalidValue, NotFound, NotRoot, UsageError, about, printable
from calicoctl.grammar import Prepared, parse, require_root
from calicoctl.output import abridges, data_format, first_few, print_data, print_table, quantity, warn, warn_of_each
from calicoctl.workloads import docker_networks, libnetwork, network_profiles
from calicoctl.workloads.docker_networks import Connection
from calicoctl.workloads.libnetwork import LIBNETWORK
from calicoctl.workloads.workload import DOCKER, called, short_id

Unconnected = tuple[Endpoint, str]
"""A container that cannot be connected as its labels ask: see `unconnected`."""

COLUMNS = ["Hostname", "Orchestrator ID", "Workload ID", "Endpoint ID", "Addresses", "MAC", "Profiles", "State"]
EXPENDABLE = ("MAC", "Orchestrator ID", "Endpoint ID")
"""Columns to leave out on a narrow terminal, the least important first."""

MOST_REASONS = 10
"""The maximum number of endpoints for which the reason for their status is printed."""


def prepare(argv: list[str]) -> Prepared:
    arguments = parse(str(__doc__), argv)
    for option in ("--orchestrator", "--workload", "--endpoint"):
        if arguments[option] == "":  # for example an unset variable of a script
            raise CalicoError(f"{option}: it must not be empty")
    if arguments["--host"] is not None:
        with about("--host"):
            check_hostname(arguments["--host"])
    if not arguments["profile"] and not arguments["remove"]:
        if arguments["--counters"]:
            require_root()
            return partial(_show_counters, arguments)
        return partial(_show, arguments)
    if not arguments["<ENDPOINT_ID>"]:  # an unset variable of a script, say: it would match the beginning of every id
        raise UsageError("Say which endpoint")
    if not arguments["profile"]:
        require_root()
        return partial(_remove, arguments)
    return partial(_profile, arguments, profile_names(arguments))


def _show(arguments: dict[str, Any]) -> None:
    form = data_format(arguments)
    datastore = DatastoreClient.from_environment()
    endpoints = _matching(datastore, arguments, arguments["--endpoint"])
    filters = [f for f in ("--host", "--orchestrator", "--workload", "--endpoint") if arguments[f] is not None]
    failed = _unconnected_matching(datastore.host, arguments, endpoints) if arguments["--detailed"] else []
    if not endpoints and filters and not failed:
        raise NotFound(f"There is no endpoint with {' and '.join(f'{name}={arguments[name]}' for name in filters)}.")
    if arguments["--detailed"]:
        show_endpoints(datastore, endpoints, arguments, failed)
        return
    counts: dict[tuple[str, str], list[Endpoint]] = {}
    for endpoint in endpoints:
        counts.setdefault((endpoint.id.host, endpoint.id.orchestrator), []).append(endpoint)
    rows = [
        (host, orchestrator, len({endpoint.id.workload for endpoint in some}), len(some))
        for (host, orchestrator), some in sorted(counts.items())
    ]
    if form:
        print_data([dict(zip(("host", "orchestrator", "workloads", "endpoints"), row)) for row in rows], form)
    else:
        columns = ["Hostname", "Orchestrator ID", "Number of Workloads", "Number of Endpoints"]
        print_table(columns, rows, complete=arguments["--no-trunc"])


def _show_counters(arguments: dict[str, Any]) -> None:
    from calicoctl.diagnose import counters

    datastore = DatastoreClient.from_environment()
    if arguments["--host"] not in (None, datastore.host):
        raise CalicoError(f"Each host counts by itself: run this command on {arguments['--host']}.")
    arguments = {**arguments, "--host": datastore.host}
    endpoints = _matching(datastore, arguments, arguments["--endpoint"])
    found = counters.of_endpoints(endpoints, counters.read())
    if form := data_format(arguments):
        print_data(({**asdict(one.id), **one.to_dict(), **counted} for one, counted in zip(endpoints, found)), form)
        return
    short = abridges(arguments)
    rows = [
        [
            workload_cell(endpoint, short),
            short_id(endpoint.id.endpoint) if short else endpoint.id.endpoint,
            *("" if counted[way] is None else _amount(counted[way]) for way in ("sent", "received")),
            "\n".join(f"{one['direction']}, {one['reason']}: {_amount(one)}" for one in counted["dropped"]),
        ]
        for endpoint, counted in zip(endpoints, found)
    ]
    since = f"Dropped since {found[0]['since']}" if found else "Dropped"
    print_table(
        ["Workload ID", "Endpoint ID", "Sent", "Received", since], rows, expendable=EXPENDABLE, complete=not short
    )


def _amount(counted: dict[str, Any]) -> str:
    return f"{quantity(counted['packets'], 'packet')}, {quantity(counted['bytes'], 'byte')}"


def _matching(datastore: DatastoreClient, arguments: dict[str, Any], endpoint_id: str | None) -> list[Endpoint]:
    """Return the valid endpoints that the options in `arguments` and `endpoint_id` select, sorted by `display_order`.

    `endpoint_id` is an endpoint's id, or the beginning of the id; None selects all endpoints. Prints a warning for each
    invalid endpoint that --host, --orchestrator and `endpoint_id` select.
    """
    return _selected(_in_order(_read(datastore, arguments, endpoint_id)), arguments, endpoint_id)


def _read(
    datastore: DatastoreClient, arguments: dict[str, Any], endpoint_id: str | None
) -> tuple[list[Endpoint], list[InvalidValue]]:
    """Read the endpoints that --host and --orchestrator in `arguments`, and `endpoint_id`, select; see _matching.

    Return the valid ones, and an error for each invalid one. The other options are not considered.
    """
    place = arguments["--host"], arguments["--orchestrator"]
    if endpoint_id is None:
        return datastore.readable_endpoints(*place)
    return datastore.endpoints_beginning(endpoint_id, *place)


def _selected(endpoints: list[Endpoint], arguments: dict[str, Any], endpoint_id: str | None) -> list[Endpoint]:
    """Return those of `endpoints` that the options in `arguments` and `endpoint_id` select; see _matching."""
    return [
        endpoint
        for endpoint in endpoints
        if arguments["--host"] in (None, endpoint.id.host)
        and arguments["--orchestrator"] in (None, endpoint.id.orchestrator)
        and (
            endpoint.id.workload.startswith(arguments["--workload"] or "")
            or endpoint.workload_name == arguments["--workload"]
        )
        and endpoint.id.endpoint.startswith(endpoint_id or "")
    ]


def _unconnected_matching(host: str, arguments: dict[str, Any], endpoints: list[Endpoint]) -> list[Unconnected]:
    """Return those results of `unconnected` that the options in `arguments` select, and that have none of `endpoints`.

    `host` is this host.
    """
    connected = {endpoint.id.workload for endpoint in endpoints}
    if arguments["--host"] not in (None, host) or arguments["--orchestrator"] not in (None, DOCKER):
        return []
    found = [] if arguments["--endpoint"] is not None else unconnected(host)
    found = [one for one in found if one[0].id.workload not in connected]  # a command has just connected them
    workload = arguments["--workload"] or ""
    return [(one, why) for one, why in found if one.id.workload.startswith(workload) or one.workload_name == workload]


def _profile(arguments: dict[str, Any], names: list[str]) -> None:
    form = data_format(arguments)
    id = arguments["<ENDPOINT_ID>"]
    datastore = DatastoreClient.from_environment()
    endpoint = _only(_matching(datastore, arguments, id), id)
    if arguments["show"]:
        show_profiles(endpoint, form)
        return
    connection = None
    if endpoint.id.orchestrator == LIBNETWORK:
        if endpoint.id.host == datastore.host:
            connection = docker_networks.connection_of(endpoint)
        elif libnetwork.is_ours(endpoint.id):
            warn(
                f"Warning: {called(endpoint)} keeps these profiles until it stops. Run the command on "
                f"{endpoint.id.host} to have them kept for its next start, too."
            )
    change_profiles(datastore, endpoint, id, arguments, names, connection)


def _remove(arguments: dict[str, Any]) -> None:
    from calicoctl.workloads.endpoint_removal import remove_endpoint

    id = arguments["<ENDPOINT_ID>"]
    datastore = DatastoreClient.from_environment()
    endpoints, invalid = _read(datastore, arguments, id)
    ids = [keys.parse_endpoint(error.key) for error in invalid]
    endpoints += [Endpoint(id) for id in ids if id is not None]  # an invalid endpoint can be removed, too
    endpoint = _only(_selected(endpoints, arguments, id), id)
    released = remove_endpoint(datastore, endpoint.id)
    print(
        f"Removed endpoint {endpoint.id.endpoint}" + (f", released {', '.join(map(str, released))}" if released else "")
    )


def _only(found: list[Endpoint], id: str) -> Endpoint:
    """Return the endpoint in `found` with this id or, if there is none, the only one in `found`.

    `found` are endpoints whose ids begin with `id`. Raises NotFound if there is none, CalicoError if there are several.
    """
    found = [endpoint for endpoint in found if endpoint.id.endpoint == id] or found
    if not found:
        raise NotFound(f"Endpoint {id} does not exist.")
    if len(found) > 1:
        some = first_few(map(described, found))
        raise CalicoError(f"{id} matches several endpoints ({some}): give more of its id.")
    return found[0]


# Shared with `container` and `profile`


def unconnected(host: str, workload: str | None = None) -> list[Unconnected]:
    """Return the containers of `host`, which is this host, that cannot be connected as their labels ask.

    If `workload` is not None, only the container with this id is returned. For each container, the result has an
    endpoint without an id, with the state `error`, and the reason. It is empty if the host's agent does not run.
    """
    from calicoctl.diagnose import host_status  # imports much that most commands about endpoints do not need

    found = []
    for one in host_status.containers_not_connected(host):
        if workload in (None, one["workload"]):
            id = EndpointId(host, DOCKER, one["workload"], "")
            found.append((Endpoint(id, state="error", workload_name=one["workload_name"]), one["reason"]))
    return sorted(found, key=lambda pair: display_order(pair[0]))


def readable_endpoints(
    datastore: DatastoreClient, wanted: Callable[[Endpoint], bool] = lambda endpoint: True
) -> list[Endpoint]:
    """Return the valid endpoints of all hosts that are `wanted`, in display order (see `display_order`).

    Prints warnings about invalid endpoints.
    """
    return _in_order(datastore.readable_endpoints(wanted=wanted))


def _in_order(read: tuple[list[Endpoint], list[InvalidValue]]) -> list[Endpoint]:
    """Return the valid endpoints that were read, in display order. Print warnings about invalid ones."""
    warn_of_each(sorted(read[1], key=lambda error: error.key))
    return sorted(read[0], key=display_order)


def display_order(endpoint: Endpoint) -> tuple[object, ...]:
    """Return the sort key of an endpoint: host, workload's name, addresses as numbers, and ids."""
    addresses = [pack(address) for address in endpoint.addresses]
    id = endpoint.id
    numbers = [(len(address), address) for address in addresses]
    return id.host, endpoint.workload_name or id.workload, numbers, id.orchestrator, id.workload, id.endpoint


def described(endpoint: Endpoint) -> str:
    """Return a text with an endpoint's id, the display name of its workload (see `called`), and its host."""
    return f"{endpoint.id.endpoint} of {called(endpoint)} on {endpoint.id.host}"


def workload_cell(endpoint: Endpoint, short: bool) -> str:
    """Return the table cell for an endpoint's workload.

    If `short` is true, the cell is the display name (see `called`). If not, it is the workload's id and, on a second
    line, the workload's name, if that is known.
    """
    if short:
        return called(endpoint)
    return "\n".join(filter(None, (endpoint.id.workload, endpoint.workload_name)))


def show_endpoints(
    datastore: DatastoreClient,
    endpoints: Sequence[Endpoint],
    arguments: dict[str, Any],
    failed: Sequence[Unconnected] = (),
) -> None:
    """Print endpoints with all their fields, as JSON or as a table, abridged on a terminal (see output.abridges).

    The containers in `failed` (see `unconnected`) follow the endpoints. After a table, prints a warning with the reason
    for each endpoint that has one, and whose status is `error` or `up`, but for MOST_REASONS endpoints at most.
    """
    stored_status_of = datastore.hosts.endpoint_statuses([endpoint.id for endpoint in endpoints])
    reason_of = {endpoint.id: reason for endpoint, reason in failed}
    endpoints = [*endpoints, *(endpoint for endpoint, _ in failed)]

    def status_of(id: EndpointId) -> tuple[str, str | None]:
        return ("error", reason_of[id]) if id in reason_of else stored_status_of(id)

    form = data_format(arguments)
    if form:
        print_data((_as_json(endpoint, *status_of(endpoint.id)) for endpoint in endpoints), form)
        return
    short = abridges(arguments)
    rows = (_row(endpoint, status_of(endpoint.id)[0], short) for endpoint in endpoints)  # not all at once
    print_table(COLUMNS, rows, expendable=EXPENDABLE, complete=not short)
    reasons = [
        f"Endpoint {short_id(endpoint.id.endpoint)} of {called(endpoint)} is {status}: {reason}."
        if endpoint.id.endpoint
        else f"{called(endpoint)} cannot be connected as its labels ask: {reason.rstrip('.')}."
        for endpoint in endpoints
        for status, reason in [status_of(endpoint.id)]
        if reason is not None and status in ("error", "up")
    ]
    for reason in reasons[:MOST_REASONS]:
        warn(reason)
    if reasons[MOST_REASONS:]:
        more = len(reasons) - MOST_REASONS
        warn(f"{more} more {'has a reason' if more == 1 else 'have reasons'}, too: see --output=json.")


def _row(endpoint: Endpoint, status: str, short: bool) -> list[str | None]:
    """Return an endpoint's cells in the table with the columns COLUMNS; with `short`, abridged."""
    nets = endpoint.nets
    if short:
        nets = [net if net not in map(host_net, endpoint.addresses) else net.partition("/")[0] for net in nets]
    return [
        endpoint.id.host,
        endpoint.id.orchestrator,
        workload_cell(endpoint, short),
        short_id(endpoint.id.endpoint) if short else endpoint.id.endpoint,
        "\n".join(nets),
        endpoint.mac,
        "\n".join(endpoint.profile_ids),
        _state(endpoint, status, short),
    ]


def _state(endpoint: Endpoint, status: str, short: bool) -> str:
    """Return the table cell for an endpoint's state.

    For an inactive endpoint, the cell also says since when it has been inactive (if `short` is true, for how long), if
    that is known. For an active endpoint, the cell also contains `status`, unless that is `up`.
    """
    since = endpoint.inactive_since
    if since:
        return f"{endpoint.state} {_duration(since) if short else f'since {since}'}"
    return endpoint.state if endpoint.state != "active" or status == "up" else f"{endpoint.state} ({status})"


def _as_json(endpoint: Endpoint, status: str, reason: str | None) -> dict[str, Any]:
    """Return an endpoint's fields for JSON, including its status and those that the store omits since they are None."""
    optional = {"inactive_since": endpoint.inactive_since, "workload_name": endpoint.workload_name}
    id = {**asdict(endpoint.id), "endpoint": endpoint.id.endpoint or None}
    return {**id, **endpoint.to_dict(), **optional, "status": status, "reason": reason}


def _duration(since: str) -> str:
    """Return how much time has passed since `since`, as text such as "for 5min".

    `since` is a time in the format of clock.py. If it has another format, return "since" and `since` itself.
    """
    try:
        begin = clock.parse(since)
    except ValueError:  # in another program's format
        return f"since {since}"
    seconds = max(0, int((datetime.now(timezone.utc) - begin).total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"for {seconds // length}{unit}"
    return f"for {seconds}s"


def show_profiles(endpoint: Endpoint, form: str | None) -> None:
    """Print the names of an endpoint's profiles, in the order of evaluation."""
    if form:
        print_data(endpoint.profile_ids, form)
    else:
        print("".join(f"{printable(name)}\n" for name in endpoint.profile_ids), end="")


def profile_names(arguments: dict[str, Any]) -> list[str]:
    """Return the names of profiles on the command line. Raises UsageError if `append` or `remove` has none.

    For `append` and `set`, raises CalicoError for a repeated name, and NotFound for an invalid one. For `remove`, all
    names are valid, since an old tool may have added any name to an endpoint's list; a repeated one is returned once.
    """
    names = list(arguments["<PROFILES>"])
    if not names and (arguments["append"] or arguments["remove"]):
        raise UsageError("Say which profiles")
    if arguments["remove"]:
        return list(dict.fromkeys(names))
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise CalicoError(f"Profile {twice} is named twice; an endpoint's list may hold each profile once.")
    return [check_known_profile(name) for name in names]


def check_known_profile(name: str) -> str:
    """Return `name` if it can be part of a key in etcd. Raise NotFound if it cannot, since no profile can be called so.

    Whether the profile exists is not checked. The stricter rules for the names of new profiles do not apply here, since
    another tool may have created the profile.
    """
    if not keys.can_be_part(name):
        raise NotFound(f"There is no such profile: '{name}' is not a valid profile name.")
    return name


def change_profiles(
    datastore: DatastoreClient,
    endpoint: Endpoint,
    name: str,
    arguments: dict[str, Any],
    profiles: list[str],
    connection: Connection | None = None,
) -> None:
    """Append `profiles` to an endpoint's list, remove them from it, or replace the list, as `arguments` say.

    Prints what was done. Messages call the endpoint `name`. `connection` is the connection of a container of this host
    to a Docker network, if the endpoint belongs to one: then the list is also kept for the container's next endpoints
    in that network. Raises NotFound, without a change, if a profile to remove is not in the list, or if a profile to
    append or set does not exist. Raises NotRoot if there is a `connection`, and the process does not run as root, and
    CalicoError if the list is to be extended or shortened, but not known yet (network_profiles.refuse_pending).
    """
    if connection is not None and os.geteuid() != 0:
        raise NotRoot(
            f"The profiles of {connection.container_name} in the Docker network {connection.network_name} are kept for "
            "its next start, in a file of this host: this command must be run as root (with sudo, say)."
        )
    if arguments["remove"]:
        missing = [profile for profile in profiles if profile not in endpoint.profile_ids]
        if missing:
            raise NotFound(f"Profile {missing[0]} is not in the list of {name}; nothing is removed.")
    else:
        for profile in profiles:
            datastore.require_profile(profile)

    def change(endpoint: Endpoint) -> bool:
        old = endpoint.profile_ids
        if not arguments["set"]:
            network_profiles.refuse_pending(endpoint)
        if arguments["append"]:
            endpoint.profile_ids = old + [profile for profile in profiles if profile not in old]
        elif arguments["set"]:
            endpoint.profile_ids = profiles
        else:
            endpoint.profile_ids = [profile for profile in old if profile not in profiles]
        return endpoint.profile_ids != old

    if connection is not None:
        changed = network_profiles.modify(datastore, connection, change)
    else:
        changed = datastore.modify_endpoint(endpoint.id, change, endpoint.entry)
    if arguments["append"] and not changed:
        subject, verb = ("Profiles", "are") if profiles[1:] else ("Profile", "is")
        print(f"{subject} {printable(', '.join(profiles))} {verb} in the list of {name} already.")
    elif arguments["append"]:
        print(f"Profiles {printable(', '.join(profiles))} appended")
    else:
        names = printable(", ".join(profiles)) or "none"
        print(f"Profiles {names} {'set' if arguments['set'] else 'removed'}.")
