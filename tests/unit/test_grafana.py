"""Dashboard, rules and containers of ``scripts/grafana`` fit together.

Whether their metrics exist, a real server tells (``tests/engine/test_serving_server.py``).
"""

import json
from pathlib import Path

import yaml

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "grafana"


def load(name):
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def mounts(service):
    """Path in the container to path here."""
    volumes = load("docker-compose.yaml")["services"][service]["volumes"]
    parts = [volume.split(":") for volume in volumes]
    assert all(mode == "ro" for _, _, mode in parts)
    return {inside: FOLDER / outside for outside, inside, _ in parts}


def test_every_file_that_is_mounted_is_here():
    for service in ("prometheus", "grafana"):
        assert all(path.exists() for path in mounts(service).values())


def test_prometheus_finds_its_rules_and_grafana_its_dashboard():
    configured = mounts("prometheus")
    (rules,) = load("prometheus.yml")["rule_files"]
    assert configured[f"/etc/prometheus/{rules}"] == FOLDER / "alerts.yaml"
    (provider,) = load("provisioning/dashboards/kv_eviction.yaml")["providers"]
    inside = f"{provider['options']['path']}/kv_eviction.json"
    assert mounts("grafana")[inside] == FOLDER / "kv_eviction.json"
    assert mounts("grafana")["/etc/grafana/provisioning"].is_dir()


def test_grafana_asks_the_prometheus_beside_it():
    (source,) = load("provisioning/datasources/prometheus.yaml")["datasources"]
    services = load("docker-compose.yaml")["services"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert any(text.endswith(f":{port}") for text in services[host]["ports"])
    (target,) = load("prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"]
    assert any(text.startswith(target.split(":")[0]) for text in services[host]["extra_hosts"])


def test_nothing_listens_beyond_this_machine():
    for service in load("docker-compose.yaml")["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_every_alert_says_what_is_wrong_and_what_to_do():
    (group,) = load("alerts.yaml")["groups"]
    names = [rule["alert"] for rule in group["rules"]]
    assert names == ["KVEvictionStalled", "KVEvictionPolicyFails", "PreemptionsRising"]
    for rule in group["rules"]:
        assert rule["expr"].count("(") == rule["expr"].count(")")
        assert rule["annotations"]["summary"].endswith(".")
        assert rule["annotations"]["description"].endswith(".")


def test_panels_do_not_overlap():
    panels = json.loads((FOLDER / "kv_eviction.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        rows = range(place["y"], place["y"] + place["h"])
        cells = {(x, y) for x in columns for y in rows}
        assert max(columns) < 24
        assert not taken & cells, panel["title"]
        taken |= cells
