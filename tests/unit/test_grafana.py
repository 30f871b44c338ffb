"""The dashboard draws only what `/metrics` exports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "grafana"
LISTED = (ROOT / "tests" / "contract" / "metrics.txt").read_text().splitlines()
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
NAME = re.compile(r"\b(?:lockstep|vllm):\w+")


def exported() -> dict[str, set[str]]:
    """Sample name -> its labels."""
    found = {}
    for line in LISTED:
        if line and not line.startswith("#"):
            name, kind, labels = line.split(" ")
            for suffix in SUFFIXES[kind]:
                found[name + suffix] = {*labels.split(","), *(["le"] if suffix == "_bucket" else [])}
    return found


def expressions(node: Any) -> list[str]:
    """Every query in the dashboard."""
    if isinstance(node, dict):
        own = [node["expr"]] if "expr" in node else [node["query"]] if isinstance(node.get("query"), str) else []
        return own + [e for value in node.values() for e in expressions(value)]
    return [e for value in node for e in expressions(value)] if isinstance(node, list) else []


def test_every_name_and_label_in_the_dashboard_is_exported() -> None:
    board = json.loads((FOLDER / "lockstep.json").read_text())
    queries = expressions(board)
    names = {name for query in queries for name in NAME.findall(query)}
    have = exported()
    assert len(names) > 25
    assert names <= have.keys(), names - have.keys()
    for query in queries:
        used = {label for name in NAME.findall(query) for label in have[name]} | {"model_name", "engine"}
        grouped = {label.strip() for inside in re.findall(r"\b(?:by|ignoring) \(([^)]*)\)", query) for label in inside.split(",")}
        assert grouped <= used, query


def test_panels_have_places_of_their_own_and_ids_of_their_own() -> None:
    panels = json.loads((FOLDER / "lockstep.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells


def test_provisioning_and_scrape_files_are_yaml_and_point_at_the_default_port() -> None:
    for path in FOLDER.rglob("*.y*ml"):
        assert yaml.safe_load(path.read_text()), path
    scrape = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert scrape["scrape_configs"][0]["static_configs"][0]["targets"] == ["127.0.0.1:8000"]
