"""Series of roles and SLOs, and the dashboard that shows them all."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest

from sglang_ares.srt.managers.io_struct import WorkerReport
from sglang_ares.srt.managers.role_planner import RoleLoads
from sglang_ares.srt.observability.metrics import (
    FRONT_SERIES,
    SERIES,
    ControllerMetrics,
    SloMetrics,
)
from sglang_ares.srt.observability.slo import Served, SloAttainment
from sglang_ares.srt.policy.elastic.instances import Slo

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "sglang-ares.json"
LABELS = {name: {"model_name", *labels} for name, _, labels, _ in (*SERIES, *FRONT_SERIES)}
KINDS = {name: kind for name, kind, _, _ in (*SERIES, *FRONT_SERIES)}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> prometheus_client.CollectorRegistry:
    """A registry of the test's own."""
    registry = prometheus_client.CollectorRegistry()
    for kind in ("Counter", "Gauge", "Histogram"):
        original = getattr(prometheus_client, kind)
        monkeypatch.setattr(
            prometheus_client,
            kind,
            lambda *args, original=original, **kwargs: original(*args, registry=registry, **kwargs),
        )
    return registry


def test_loads_as_ratios(registry: prometheus_client.CollectorRegistry) -> None:
    metrics = ControllerMetrics("m")
    workers = {0: ("prefill", 0.25), 1: ("decode", 1.5), 2: ("decode", None)}
    metrics.role_loads(RoleLoads({"prefill": 0.25, "decode": 1.5}, workers))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"sglang_ares:{name}", {"model_name": "m", **labels})

    assert value("role_load_ratio", role="decode") == 1.5
    assert value("worker_load_ratio", worker="0", role="prefill") == 0.25
    assert value("worker_load_ratio", worker="2", role="decode") is None
    assert value("role_workers", role="decode") == 2


def report(worker_id: int, kv_tokens: int) -> WorkerReport:
    sums = SimpleNamespace(predictions=2, absolute=8.0, signed=4.0, under_median=1, under_high=2)
    load = SimpleNamespace(
        worker_id=worker_id,
        role="decode",
        kv_tokens=kv_tokens,
        kv_capacity=10_000,
        running=3,
        queued=1,
        step=SimpleNamespace(fixed_ms=5.0, per_request_ms=1.0, per_token_ms=0.1),
    )
    return SimpleNamespace(  # type: ignore[return-value]
        worker_id=worker_id,
        load=load,
        retracted=0,
        decode_step_ms=7.0,
        dropped_frames=0,
        predictions=SimpleNamespace(not_finite=0, errors={20: sums}),
    )


def test_nothing_is_shown_of_a_worker_that_is_gone(
    registry: prometheus_client.CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = ControllerMetrics("m")
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def of_1(kind: str) -> dict[str, set[float]]:
        found: dict[str, set[float]] = {}
        for family in registry.collect():
            for sample in family.samples if family.type == kind else ():
                if sample.labels.get("worker") == "1":
                    found.setdefault(sample.name.partition(":")[2], set()).add(sample.value)
        return found

    def imbalance() -> float | None:
        return registry.get_sample_value("sglang_ares:imbalance_ratio", {"model_name": "m"})

    for clock[0] in (0.0, 4.0):
        for worker, tokens in ((1, 9000), (2, 1000), (3, 1000)):
            metrics.reported(report(worker, tokens))
    assert imbalance() == pytest.approx(27 / 11)
    assert of_1("gauge")["worker_kv_tokens"] == {9000}
    metrics.worker_gone(1, "decode")
    shown = of_1("gauge")
    learnt = ("decode_step_law_seconds", "prediction_bias_tokens", "prediction_calibration")
    assert imbalance() == 1.0
    for name in learnt:
        assert all(map(math.isnan, shown.pop(name)))
    assert shown and all(values == {0} for values in shown.values()), shown
    clock[0] = 100.0
    metrics.reported(report(1, 1000))
    assert of_1("counter")["worker_role_seconds_total"] == {4}, "its absence is no time of service"
    assert of_1("gauge")["prediction_bias_tokens"] == {2}


def test_attainment(registry: prometheus_client.CollectorRegistry) -> None:
    metrics = SloMetrics("m")
    attainment = SloAttainment(Slo(ttft_ms=100.0, tpot_ms=0.0))

    def shares(window: str) -> list[float | None]:
        return [
            registry.get_sample_value(
                "sglang_ares:slo_attainment", {"model_name": "m", "slo": slo, "window": window}
            )
            for slo in ("ttft", "tpot", "both")
        ]

    attainment.served(Served(0.05, 1.0, 11), now=1.0)
    attainment.served(Served(0.5, 1.0, 11), now=1.0)
    metrics.show(attainment, now=2.0)
    ttft, tpot, both = shares("60")
    assert ttft == both == 0.5 and tpot is not None and math.isnan(tpot)
    metrics.show(attainment, now=200.0)
    assert all(s is not None and math.isnan(s) for s in shares("60")), "nothing lately"
    assert shares("600")[0] == 0.5


# --- the dashboard --------------------------------------------------------------------------


def dashboard() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return document


def queries() -> Iterator[str]:
    """Every PromQL expression of the dashboard."""
    document = dashboard()
    for panel in document["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]
    for variable in document["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


def of_series(name: str) -> str:
    """The series that a sample's name belongs to."""
    for suffix in ("_bucket", "_sum", "_count"):
        base = name.removesuffix(suffix)
        if base != name and KINDS.get(base) == "histogram":
            return base
    return name


def test_every_series_it_asks_for_exists() -> None:
    """Ours are in the tables; upstream's are created by its collectors."""
    from sglang.srt.observability import metrics_collector

    upstreams = Path(metrics_collector.__file__).read_text()
    asked = [n for q in queries() for n in re.findall(r"\b(sglang(?:_ares)?:\w+)", q)]
    assert len(asked) > 20
    for name in asked:
        prefix, _, rest = name.partition(":")
        if prefix == "sglang_ares":
            assert of_series(rest) in KINDS, name
        else:
            base = re.sub(r"_(bucket|sum|count|total)$", "", name)
            assert f'"{base}"' in upstreams or f'"{name}"' in upstreams, name


def test_it_asks_for_every_series_of_ours() -> None:
    text = "\n".join(queries())
    missing = [name for name in KINDS if f"sglang_ares:{name}" not in text]
    assert not missing


def test_it_groups_and_selects_by_labels_that_exist() -> None:
    for query in queries():
        if "sglang_ares:" not in query or query.startswith("label_values"):
            continue
        known = {"le"}.union(
            *(LABELS[of_series(n)] for n in re.findall(r"\bsglang_ares:(\w+)", query))
        )
        by = {
            label.strip()
            for group in re.findall(r"\bby \(([^)]*)\)", query)
            for label in group.split(",")
        }
        selected = set(re.findall(r"(\w+)=~?\"", query))
        assert by | selected <= known, query


def test_counters_are_shown_as_rates() -> None:
    for query in queries():
        for name in re.findall(r"\bsglang_ares:(\w+)", query):
            if KINDS.get(name) == "counter":
                assert re.search(r"(rate|increase)\(sglang_ares:" + name, query), query


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    panels = dashboard()["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
