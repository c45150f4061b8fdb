"""The JSON of the store: tolerant reading, and nothing lost when a value is rewritten."""

from __future__ import annotations

import json

import pytest

from calicoctl.datastore import keys
from calicoctl.datastore.keys import EndpointId
from calicoctl.datastore.model import Endpoint, Pool, Rules, load_strings
from calicoctl.errors import InvalidValue

ID = EndpointId("vm", "docker", "c" * 64, "b7bfd19ee7610a1b2c3d4e5f60718293")
KEY = f"/calico/v1/host/vm/workload/docker/{'c' * 64}/endpoint/b7bfd19ee7610a1b2c3d4e5f60718293"
RECORD = {
    "state": "active",
    "name": "calib7bfd19ee76",
    "mac": "86:32:73:fd:c6:86",
    "profile_ids": ["web"],
    "ipv4_nets": ["192.168.0.1/32"],
    "ipv6_nets": [],
    "ipv4_gateway": "192.0.2.2",
    "ipv6_gateway": None,
}


def test_an_endpoints_key_and_back() -> None:
    assert keys.endpoint(ID) == KEY
    assert keys.parse_endpoint(KEY) == ID
    assert keys.parse_endpoint("/calico/v1/host/vm/bird_ip") is None
    assert ID.interface == "calib7bfd19ee76"


def test_an_endpoint_is_written_as_it_was_read() -> None:
    assert json.loads(Endpoint.from_json(ID, json.dumps(RECORD), KEY).to_json()) == RECORD


def test_unknown_fields_of_an_endpoint_are_kept() -> None:
    record = {**RECORD, "inactive_since": "2015-07-01T00:00:00Z", "labels": {"a": [1]}}
    assert json.loads(Endpoint.from_json(ID, json.dumps(record), KEY).to_json()) == record


def test_the_single_profile_of_old_writers_becomes_a_list() -> None:
    old = {**RECORD, "profile_id": "db"}
    del old["profile_ids"]
    written = json.loads(Endpoint.from_json(ID, json.dumps(old), KEY).to_json())
    assert written == {**RECORD, "profile_ids": ["db"]}


def test_missing_fields_of_an_endpoint_get_their_defaults() -> None:
    endpoint = Endpoint.from_json(ID, "{}", KEY)
    assert (endpoint.state, endpoint.name, endpoint.nets, endpoint.profile_ids) == ("active", ID.interface, [], [])


@pytest.mark.parametrize(
    "value",
    ["", "{", "[]", "7", '{"ipv4_nets": "x"}', '{"profile_ids": [1]}', '{"mac": 1}', '{"state": []}', "[" * 99_999]
    + ['{"ipv4_nets": ["fd00::1/128"]}', '{"ipv6_nets": ["::1"]}', '{"ipv4_nets": ["10.0.0.1/33"]}', '{"mac": "x"}'],
)
def test_garbage_is_refused_with_its_key(value: str) -> None:
    with pytest.raises(InvalidValue, match=KEY):
        Endpoint.from_json(ID, value, KEY)


def test_a_new_profiles_rules_are_those_of_the_data_model() -> None:
    assert json.loads(Rules.default("web").to_json()) == {
        "id": "web",
        "inbound_rules": [{"action": "allow", "src_tag": "web"}],
        "outbound_rules": [{"action": "allow"}],
    }


def test_rules_that_no_command_writes_are_kept() -> None:
    stored = {
        "id": "web",
        "inbound_rules": [{"action": "log", "ip_version": 6, "protocol": "udplite", "x": 1}],
        "outbound_rules": [],
        "y": {},
    }
    assert json.loads(Rules.from_json("web", json.dumps(stored), "k").to_json()) == stored


def test_pool_options_that_are_off_are_left_out() -> None:
    assert Pool("10.0.0.0/24").to_dict() == {"cidr": "10.0.0.0/24"}
    text = '{"cidr": "10.0.0.0/24", "ipip": "tunl0", "masquerade": true, "disabled": false}'
    assert Pool.from_json(text, "k").to_dict() == json.loads(text)
    assert Pool.from_json('{"cidr": "10.0.0.0/24", "ipip": false, "masquerade": false}', "k").to_dict() == {
        "cidr": "10.0.0.0/24"
    }
    with pytest.raises(InvalidValue, match="/k"):
        Pool.from_json('{"cidr": "10.0.0.0/99"}', "/k")


def test_tags_are_a_list_of_strings() -> None:
    assert load_strings('["a", "b"]', "/k") == ["a", "b"]
    for garbage in ('{"a": 1}', "[1]", "a"):
        with pytest.raises(InvalidValue, match="/k"):
            load_strings(garbage, "/k")
