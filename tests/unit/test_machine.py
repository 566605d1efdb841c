"""Hardware and identity of a run."""

import json

from harness.records.code import code_fingerprint
from harness.records.machine import device_memory_mib, hardware, process_peak_memory_mib
from harness.records.provenance import SCHEMA_VERSION, identity, provenance
from harness.sweep.offline import MEASURING


def test_hardware_of_a_cpu():
    found = hardware("cpu")
    assert found["device"] == "cpu"
    assert found["cores"] >= 1
    assert found["memory_gib"] > 0
    assert "gpu" not in found


def test_memory():
    assert process_peak_memory_mib() > 10
    assert device_memory_mib("cpu") is None


def test_provenance_names_versions_hardware_and_code():
    source = provenance(MEASURING)
    assert "torch" in source["versions"]
    assert source["code"] == code_fingerprint(MEASURING)
    json.dumps(source)


def test_the_gpu_is_what_tells_machines_apart_where_there_is_one():
    source = provenance(MEASURING)
    record = {"schema_version": SCHEMA_VERSION, **source}
    assert identity(record)["hardware"] == source["hardware"]["cpu"]
    record["hardware"] = {**source["hardware"], "gpu": "a card"}
    assert identity(record)["hardware"] == "a card"
