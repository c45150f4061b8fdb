"""Show and change profiles: network policy as tags and rules.

Usage:
  calicoctl profile show [--detailed] [--no-trunc] [--output=<FORMAT>]
  calicoctl profile add <PROFILES>...
  calicoctl profile remove <PROFILES>... [--no-check]
  calicoctl profile <PROFILE> tag show [--output=<FORMAT>]
  calicoctl profile <PROFILE> tag (add|remove) <TAGS>...
  calicoctl profile <PROFILE> rule add (inbound|outbound) [--at=<POSITION>]
      <RULE>...
  calicoctl profile <PROFILE> rule remove (inbound|outbound)
      (--at=<POSITION> | <RULE>...)
  calicoctl profile <PROFILE> rule show [--counters] [--output=<FORMAT>]
  calicoctl profile <PROFILE> rule json
  calicoctl profile <PROFILE> rule update
  calicoctl profile trace <FROM> <TO> (tcp|udp|icmp|icmpv6) [<PORT>]
      [--from-port=<PORT>] [--output=<FORMAT>]

Options:
  <FROM>, <TO>           a container's name or id, a namespace's path or an
                         endpoint's id, of any host; a host's name; or an IP
                         address
  <PORT>                 the port that a tcp or udp packet goes to, 1 to 65535
  --from-port=<PORT>     its source port; default: 40000, which stands for an
                         ephemeral port
  --detailed             list the endpoints that have each profile, too
  --no-trunc             show everything on a terminal, too, whatever its
                         width; default: containers by their names, and 12
                         characters of ids
  --no-check             remove the profile even if endpoints have it; where
                         it is evaluated, it then denies every packet
  --at=<POSITION>        a rule's position, counted from 1; default: after the
                         last one
  --counters             show what each rule has decided on this host, too;
                         must be run as root
  -o, --output=<FORMAT>  json or yaml, for scripts; default: text

A rule is one of

  ACTION [ipv4|ipv6] (tcp|udp) [from [ports P] SIDE] [to [ports P] SIDE]
  ACTION [ipv4|ipv6] (icmp|icmpv6) [type N [code N]] [from SIDE] [to SIDE]
  ACTION [ipv4|ipv6] protocol N [from SIDE] [to SIDE]
  ACTION [ipv4|ipv6] [from SIDE] [to SIDE]

where ACTION is allow, deny or log, SIDE is [tag T] [cidr C], and P is a list
such as 80,443,8000:8010. Inbound rules apply to packets to an endpoint,
outbound rules to packets from it. The first rule that allows or denies a
packet decides; `log` writes a line to the kernel's log and continues with the
next rule. `rule json` prints a profile's rules, and `rule update` reads them
from standard input. A new profile has its own name as tag, allows inbound
packets from that tag, and allows all outbound packets.

`rule show --counters` shows how many connections each rule that allows has
let begin on this host, and what each rule that denies has dropped. Counting
begins when an endpoint of this host gets the profile, or the profile the
rule, and outlives the agent, but not a reboot. JSON: connections,
dropped_packets, dropped_bytes, since and host of each rule; they are null,
but for host, where there is nothing to count.

`trace` shows whether a packet (a connection's first one, or an echo request)
would pass from <FROM> to <TO>, and which rule of which profile decides,
outbound of <FROM> and inbound of <TO>; between two hosts, also how the packet
gets from one to the other, and what stands in its way: a host that is not
registered, an endpoint in error, an address in no pool, missing BGP peers. It
evaluates what is in etcd and, of this host, its routes to other hosts; the
exit status is 0 when the packet passes, and 1 when it does not. IPv4 is used
where both sides have it, unless an address says otherwise. All addresses of
this host are known; of other hosts, those that they are registered with.

Examples:
  calicoctl profile add web
  calicoctl profile web rule add inbound --at=1 allow tcp from tag lb
  calicoctl profile web rule show --counters
  calicoctl profile trace workload 192.168.0.2 tcp 80
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Callable, TypeVar

from calicoctl.addresses import parse_port
from calicoctl.commands.endpoint import check_known_profile, described, readable_endpoints, workload_cell
from calicoctl.datastore import keys
from calicoctl.datastore.client import DatastoreClient
from calicoctl.datastore.model import Endpoint, Rule, Rules
from calicoctl.errors import CalicoError, Failed, InvalidValue, NotFound, UsageError, for_each, one_line, printable
from calicoctl.grammar import Prepared, parse, require_root
from calicoctl.output import abridges, data_format, first_few, print_data, print_table, quantity, warn, warn_of_each
from calicoctl.policy.rules import check_name
from calicoctl.workloads import network_profiles
from calicoctl.workloads.workload import short_id

if TYPE_CHECKING:
    from calicoctl.diagnose.trace import Trace

T = TypeVar("T")


def prepare(argv: list[str]) -> Prepared:
    arguments = parse(str(__doc__), argv)
    profile = arguments["<PROFILE>"]
    if profile is not None:
        check_known_profile(profile)
    if arguments["tag"]:
        tags = list(dict.fromkeys(arguments["<TAGS>"]))
        if arguments["add"]:
            tags = [check_name(tag, "tag") for tag in tags]
        return partial(_tag_show, profile, arguments) if arguments["show"] else partial(_tag, profile, tags, arguments)
    if arguments["rule"]:
        return _prepare_rule(profile, arguments)
    if arguments["trace"]:
        return _prepare_trace(arguments)
    if arguments["show"]:
        return partial(_show, arguments)
    names = list(dict.fromkeys(arguments["<PROFILES>"]))
    if arguments["add"]:
        return partial(_add, [check_name(name, "profile") for name in names])
    return partial(_remove, [check_known_profile(name) for name in names], arguments["--no-check"])


def _add(names: list[str]) -> None:
    datastore = DatastoreClient.from_environment()
    for name in names:
        print(f"Created profile {name}" if datastore.create_profile(name) else f"Profile {name} already exists.")


def _show(arguments: dict[str, Any]) -> None:
    form = data_format(arguments)
    datastore = DatastoreClient.from_environment()
    names = datastore.profile_names()
    if not arguments["--detailed"]:
        if form:
            print_data([{"name": name} for name in names], form)
        else:
            print_table(["Name"], [[name] for name in names], complete=arguments["--no-trunc"])
        return
    endpoints = readable_endpoints(datastore)
    if form:
        copy, unread = datastore.copied(keys.PROFILES)  # of each by itself, there would be two requests
        invalid = [InvalidValue(entry.key, str(entry.problem)) for entry in unread]
        shown = [_as_json(copy, name, endpoints, invalid) for name in names if copy.profile_exists(name)]
        warn_of_each(invalid)
        print_data(shown, form)
        return
    short = abridges(arguments)
    rows: list[list[str]] = []
    for name in names:
        members = [endpoint for endpoint in endpoints if name in endpoint.profile_ids]
        rows += [
            [
                name,
                member.id.host,
                member.id.orchestrator,
                workload_cell(member, short),
                short_id(member.id.endpoint) if short else member.id.endpoint,
                member.state,
            ]
            for member in members
        ] or [[name, "None", "None", "None", "None", "None"]]
    columns = ["Name", "Host", "Orchestrator ID", "Workload ID", "Endpoint ID", "State"]
    print_table(columns, rows, expendable=("Orchestrator ID", "Endpoint ID"), complete=not short)


def _as_json(
    datastore: DatastoreClient, name: str, endpoints: list[Endpoint], invalid: list[InvalidValue]
) -> dict[str, Any]:
    """Return a profile for JSON: its name, tags and rules, and which of `endpoints` have it.

    Each of these endpoints has the fields of EndpointId, the name of its workload, and its state. If the tags are
    invalid, the field `tags` is None, and the error is appended to `invalid`; the same holds for the rules.
    """

    def readable(read: Callable[[], T]) -> T | None:
        try:
            return read()
        except InvalidValue as error:
            invalid.append(error)
            return None

    return {
        "name": name,
        "tags": readable(lambda: datastore.tags(name)),
        "rules": readable(lambda: datastore.rules(name).to_dict()),
        "endpoints": [
            {**asdict(endpoint.id), "workload_name": endpoint.workload_name, "state": endpoint.state}
            for endpoint in endpoints
            if name in endpoint.profile_ids
        ],
    }


def _remove(names: list[str], no_check: bool) -> None:
    datastore = DatastoreClient.from_environment()

    @cache  # it reads the endpoints of all hosts, so once for all profiles
    def users() -> list[Endpoint]:
        return readable_endpoints(datastore, lambda one: not set(names).isdisjoint(one.profile_ids))

    for_each(names, lambda name: _remove_one(datastore, name, None if no_check else users))


def _remove_one(datastore: DatastoreClient, profile: str, users: Callable[[], list[Endpoint]] | None) -> None:
    """Remove a profile. Raises NotFound if it does not exist, and CalicoError if it is in use.

    It is in use if one of the endpoints that `users` returns has it, or if this host keeps it for the next start of a
    container. If `users` is None, this is not checked.
    """
    # a profile may have no keys, and etcd does not list a profile whose name begins with '_'
    if not _has_keys(datastore, profile) and profile not in datastore.profile_names():
        raise NotFound(f"Profile {profile} does not exist.")
    if users is not None:
        with_it = [endpoint for endpoint in users() if profile in endpoint.profile_ids]
        if with_it:
            some = first_few(map(described, with_it))
            raise CalicoError(
                f"Profile {profile} is in use by {quantity(len(with_it), 'endpoint')} ({some}). Remove it "
                "from them first, or use --no-check."
            )
        keeping = network_profiles.containers_with(datastore.host, profile)
        if keeping:
            some = first_few(map(short_id, keeping))
            raise CalicoError(
                f"Profile {profile} is kept for the next start of {quantity(len(keeping), 'container')} in Docker "
                f"networks ({some}). Remove it from them first, with 'calicoctl container NAME profile remove "
                f"{profile}', or use --no-check."
            )
    datastore.remove_profile(profile)
    print(f"Deleted profile {printable(profile)}")


def _has_keys(datastore: DatastoreClient, profile: str) -> bool:
    try:
        return datastore.profile_exists(profile)
    except InvalidValue:  # of etcd's v2 API: there is a key in place of the directory, and it can be removed as well
        return True


def _tag_show(profile: str, arguments: dict[str, Any]) -> None:
    tags = DatastoreClient.from_environment().tags(profile)
    form = data_format(arguments)
    if form:
        print_data(tags, form)
    else:
        print("".join(f"{printable(tag)}\n" for tag in tags), end="")


def _tag(profile: str, tags: list[str], arguments: dict[str, Any]) -> None:
    datastore = DatastoreClient.from_environment()
    change = _add_tag if arguments["add"] else _remove_tag
    for_each(tags, lambda tag: change(datastore, profile, tag))


def _add_tag(datastore: DatastoreClient, profile: str, tag: str) -> None:
    def add(tags: list[str]) -> bool:
        if tag in tags:
            return False
        tags.append(tag)
        return True

    added = datastore.modify_tags(profile, add)
    name = printable(profile)
    print(f"Tag {tag} added to profile {name}" if added else f"Tag {tag} is on profile {name} already.")


def _remove_tag(datastore: DatastoreClient, profile: str, tag: str) -> None:
    def remove(tags: list[str]) -> bool:
        if tag not in tags:
            return False
        tags[:] = [other for other in tags if other != tag]
        return True

    if not datastore.modify_tags(profile, remove):
        raise NotFound(f"Tag {tag} is not on profile {profile}.")
    print(f"Tag {printable(tag)} removed from profile {printable(profile)}")


def _prepare_rule(profile: str, arguments: dict[str, Any]) -> Prepared:
    if arguments["show"]:
        if arguments["--counters"]:
            require_root()
        return partial(_rule_show, profile, arguments["--counters"], data_format(arguments))
    if arguments["json"]:
        return partial(_rule_json, profile)
    if arguments["update"]:
        return partial(_rule_update, profile)
    position = None if arguments["--at"] is None else _position(arguments["--at"])
    rule = _parse_rule(arguments["<RULE>"], is_new=arguments["add"]) if arguments["<RULE>"] else None
    direction = "inbound" if arguments["inbound"] else "outbound"
    if arguments["remove"]:
        return partial(_rule_remove, profile, direction, position, rule)
    assert rule is not None, "the grammar asks for a rule"
    return partial(_rule_add, profile, direction, position, rule)


def _rule_show(profile: str, with_counters: bool, form: str | None) -> None:
    from calicoctl.policy.rules import text

    datastore = DatastoreClient.from_environment()
    rules = datastore.rules(profile)
    counted = _counted(rules) if with_counters else None
    if form:
        shown = rules.to_dict()
        for direction, counters in (counted or {}).items():
            for rule, found in zip(shown[f"{direction}_rules"], counters):
                rule.update(found, host=datastore.host)
        print_data([shown], form)
        return
    where = f" (counted on {datastore.host})" if with_counters else ""
    for direction, some in (("inbound", rules.inbound), ("outbound", rules.outbound)):
        print(f"{direction.capitalize()} rules{where}:")
        texts = [one_line(text(rule)) for rule in some]
        if counted is not None:
            width = max(map(len, texts), default=0)
            texts = [f"{one:{width}}  {_count_text(found)}" for one, found in zip(texts, counted[direction])]
        for position, line in enumerate(texts, start=1):
            print(f" {position:3d} {line}")


def _counted(rules: Rules) -> dict[str, list[dict[str, Any]]]:
    from calicoctl.diagnose import counters

    return counters.of_rules(rules, counters.read())


def _count_text(found: dict[str, Any]) -> str:
    """Return the counters of a rule, a dictionary of `counters.of_rules`, as text."""
    if found["since"] is None:
        return "not counted"
    if found["connections"] is not None:
        what = quantity(found["connections"], "connection")
    else:
        what = f"{quantity(found['dropped_packets'], 'packet')}, {quantity(found['dropped_bytes'], 'byte')} dropped"
    return f"{what} since {found['since']}"


def _rule_json(profile: str) -> None:
    print_data(DatastoreClient.from_environment().rules(profile).to_dict(), "json")


def _rule_update(profile: str) -> None:
    from calicoctl.policy.rules import check_rules

    try:
        rules = check_rules(profile, sys.stdin.read())
    except UnicodeDecodeError:
        raise CalicoError("the rules are not JSON: they are not UTF-8 text") from None
    datastore = DatastoreClient.from_environment()
    datastore.replace_rules(rules)
    _warn_of_tags(datastore, [*rules.inbound, *rules.outbound])
    print(f"Successfully updated rules on profile {printable(profile)}")


def _rule_add(profile: str, direction: str, position: int | None, rule: Rule) -> None:
    from calicoctl.policy.rules import text

    def change(rules: Rules) -> bool:
        some = getattr(rules, direction)
        if text(rule) in map(text, some):
            return False
        if position is not None and position > len(some) + 1:
            raise CalicoError(f"Position {position} is out of range: the new rule's can be 1 to {len(some) + 1}.")
        some.insert(len(some) if position is None else position - 1, rule)
        return True

    datastore = DatastoreClient.from_environment()
    changed = datastore.modify_rules(profile, change)
    _warn_of_tags(datastore, [rule])
    name = printable(profile)
    print(f"Successfully updated rules on profile {name}" if changed else "Rule already present, skipping.")


def _warn_of_tags(datastore: DatastoreClient, rules: list[Rule]) -> None:
    """Print a warning for each tag in `rules` that no profile has, since it may be misspelt.

    If the tags of any profile are invalid, no warning is printed.
    """
    named = {tag for rule in rules for tag in (rule.src_tag, rule.dst_tag) if tag is not None}
    known = datastore.all_tags() if named else None
    if known is None:
        return
    for tag in sorted(named - known):
        warn(
            f"Warning: no profile has the tag {tag}, and it matches nothing until one has: 'calicoctl profile PROFILE "
            f"tag add {tag}'."
        )


def _rule_remove(profile: str, direction: str, position: int | None, rule: Rule | None) -> None:
    from calicoctl.policy.rules import text

    def change(rules: Rules) -> bool:
        some = getattr(rules, direction)
        if rule is not None:
            places = [place for place, other in enumerate(some) if text(other) == text(rule)]
            if not places:
                return False
            del some[places[0]]
        elif position is not None:
            if position > len(some):
                there = "there is" if len(some) == 1 else "there are"
                rules_of_it = quantity(len(some), f"{direction} rule")
                raise NotFound(f"Position {position} is out of range: {there} {rules_of_it}.")
            del some[position - 1]
        return True

    if not DatastoreClient.from_environment().modify_rules(profile, change):
        raise NotFound(f"Profile {profile} has no such {direction} rule.")
    print(f"Successfully updated rules on profile {printable(profile)}")


def _prepare_trace(arguments: dict[str, Any]) -> Prepared:
    protocol = next(word for word in ("tcp", "udp", "icmp", "icmpv6") if arguments[word])
    port, source_port = (
        None if arguments[name] is None else parse_port(arguments[name], name) for name in ("<PORT>", "--from-port")
    )
    if protocol.startswith("icmp"):
        if port is not None or source_port is not None:
            raise UsageError(f"{protocol} has no ports")
    elif port is None:
        raise UsageError(f"{protocol} needs a destination port, such as '{protocol} 80'")
    return partial(_trace, arguments, protocol, port, source_port)


def _trace(arguments: dict[str, Any], protocol: str, port: int | None, source_port: int | None) -> None:
    from calicoctl.diagnose import trace

    form = data_format(arguments)
    datastore = DatastoreClient.from_environment()
    found = trace.trace(datastore, arguments["<FROM>"], arguments["<TO>"], protocol, port, source_port)
    if form:
        print_data(found.to_dict(), form)
    else:
        for line in _trace_lines(found, datastore.host):
            print(one_line(line))
    if found.denied_by is not None:
        why = f"{found.denied_by.direction}, {found.denied_by.why}"
    elif found.stopped_by is not None:
        why = f"on {found.stopped_by.host}, {found.stopped_by.problem}"
    else:
        return
    raise Failed(one_line(f"The packet does not pass: {why}."), 1)


def _trace_lines(found: Trace, here: str) -> Iterator[str]:
    """Yield the lines that show a trace: its steps, in the order in which the packet takes them.

    `here` is this host's name. The lines name the hosts, unless no other host than this one is involved.
    """
    denied_by = found.denied_by
    names_hosts = {found.source.host, found.destination.host} - {None, here} != set()
    for decision in found.decisions:
        place, word = (found.source, "From") if decision.direction == "outbound" else (found.destination, "To")
        name = place.name if place.name == place.address else f"{place.name} ({place.address})"
        verdict = "passes" if decision.allowed else "is denied"
        if denied_by is not None and decision.direction != denied_by.direction == "outbound":
            verdict = "would pass" if decision.allowed else "would be denied"
        host = f" on {decision.host}" if names_hosts else ""
        if decision.direction == "inbound":
            yield from _way(found)
        yield f"{word} {name}{host}, {decision.direction}: {verdict} ({decision.why})"
    if found.destination.endpoint is None:
        yield from _way(found)
    for obstacle in found.obstacles:
        yield f"{'Stopped' if obstacle.stops else 'Note'}: on {obstacle.host}, {obstacle.problem}."
    if found.passes:
        yield "The packet passes."


def _way(found: Trace) -> Iterator[str]:
    """Yield the lines about a packet's way out of its source's host.

    There is a line if masquerading changes the source address, and a line if the packet is routed to another host.
    """
    if found.sent_from is not None:
        yield f"From {found.source.host}: with the source address {found.sent_from}, by masquerade"
    route = found.route
    if route is not None:
        kinds = {"plain": "by a plain route", "vxlan": "through VXLAN"}
        kind = kinds.get(route.kind, "by a plain route, or through VXLAN if a router is between them,")
        via = "" if route.via is None else f" via {route.via}"
        yield f"From {route.from_host} to {route.to_host}: {kind} to {route.destination}{via}"


def _parse_rule(words: list[str], is_new: bool) -> Rule:
    from calicoctl.policy.rules import parse as parse_rule

    try:
        return parse_rule(words, is_new)
    except UsageError as error:
        raise UsageError(str(error), _rule_usage(words)) from None


def _rule_usage(words: list[str]) -> str:
    """Return the usage to show for the invalid rule `words`: of the forms of rules in the help, the closest one."""
    forms = re.findall("^  (ACTION .*)", str(__doc__), re.MULTILINE)
    form: str = max(forms, key=lambda form: (len(set(re.findall("[a-z0-9]+", form)) & set(words)), -len(form)))
    form = form.replace("ACTION", "(allow|deny|log)").replace("SIDE", "[tag T] [cidr C]")
    begin = "Usage:\n  calicoctl profile <PROFILE> rule (add|remove) (inbound|outbound)\n      "
    return begin + re.sub(r" \[(from|to) ", r"\n      [\1 ", form)


def _position(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text, re.ASCII) or int(text) == 0:
        raise CalicoError(f"--at={text}: a position is a number, counted from 1")
    return int(text)
