"""What the archive of diagnostics shows of the store: the fields that the data model defines, and no others."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from calicoctl.datastore.client import DatastoreClient
from calicoctl.diagnose import archive
from tests.unit.memory_store import MemoryStore

DATA_MODEL = Path(__file__).parent.parent.parent / "docs/datamodel.md"
KEY = "/calico/ipam/v2/assignment/ipv4/block/192.168.0.0-26"


def shown(monkeypatch: pytest.MonkeyPatch, value: dict[str, object]) -> object:
    store = MemoryStore()
    store.create(KEY, json.dumps(value))
    monkeypatch.setattr(DatastoreClient, "from_environment", lambda: DatastoreClient(store, "h"))
    return json.loads(archive.sources("/nowhere")["etcd.json"]())[KEY]


def test_every_field_of_the_data_model_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    text = DATA_MODEL.read_text()
    block_of_2016 = ["unallocated", "strict_affinity"]
    names = {*re.findall(r'"([^"\s]+)":', text), *block_of_2016}
    assert len(names) > 30 and all(f"`{name}`" in text for name in block_of_2016)
    fields: dict[str, object] = dict.fromkeys(sorted(names), 1)
    assert shown(monkeypatch, fields) == fields


def test_other_fields_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, {"id": "a", "note": "private"}) == {"id": "a", "note": "(left out)"}


def test_passwords_in_birds_configuration_are_left_out() -> None:
    text = (
        'protocol bgp a from peer4 {\n  neighbor 192.0.2.1 as 1; password "s3 cr\'3t";\n}\n'
        "b { password  \"s3 cr'3t; } # unfinished\n"
    )
    shown = archive.without_secrets(text)
    assert "cr'3t" not in shown
    assert shown.startswith('protocol bgp a from peer4 {\n  neighbor 192.0.2.1 as 1; password "(left out)";\n}\n')
