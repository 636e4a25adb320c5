"""The dashboard asks for metrics and labels that the router has, and shows every metric there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mooncake_connector.router.metrics import ROUTER_METRICS

DASHBOARD = json.loads((Path(__file__).resolve().parents[3] / "examples/grafana/router.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
NOT_SHOWN = {"mooncake_router_introductions_total", "mooncake_router_open_placements",
             "mooncake_router_expired_total"}  # fmt: skip
SHOWN_ELSEWHERE = re.compile(r"mooncake_router_(event|index)\w*")


def test_every_query_names_a_metric_of_ours_and_its_labels() -> None:
    assert QUERIES
    for query in QUERIES:
        for name, labels in re.findall(r"(mooncake_router_\w+)\{([^}]*)\}", query):
            spec = ROUTER_METRICS.get(name) or ROUTER_METRICS[name.removesuffix("_bucket")]
            assert name.endswith("_bucket") == (spec.kind == "histogram"), query
            used = set(re.findall(r"(\w+)[=!~]+\"", labels)) - {"instance"}
            for grouping in re.findall(r"by \(([^)]*)\)", query):
                used |= {label.strip() for label in grouping.split(",")} - {"le", "instance"}
            assert used <= set(spec.labels), query
            if name.endswith("_total"):
                assert "rate(" in query or "increase(" in query, query


def test_every_metric_is_shown() -> None:
    shown = set(re.findall(r"(mooncake_router_\w+?)(?:_bucket)?\{", " ".join(QUERIES)))
    missing = {name for name in set(ROUTER_METRICS) - shown - NOT_SHOWN if not SHOWN_ELSEWHERE.fullmatch(name)}
    assert not missing


def test_panels_do_not_overlap() -> None:
    cells = [(x, y) for panel in DASHBOARD["panels"] for place in [panel["gridPos"]]
             for x in range(place["x"], place["x"] + place["w"])
             for y in range(place["y"], place["y"] + place["h"])]  # fmt: skip
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
