"""The simulated cluster: conservation, determinism, what policies see, figures, files."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ares import simulate
from sglang_ares.bench.workloads import RequestStream, lognormal
from sglang_ares.profiles.profile import ProfileError, load_profile, shipped_profiles
from sglang_ares.simulator import Result, Simulation, SimulationConfig
from sglang_ares.simulator.config import SimulationError
from sglang_ares.simulator.plots import plot_load
from sglang_ares.simulator.prediction import ErrorModel, Noisy, Truth, load_error_model
from sglang_ares.simulator.trace import trace_events, write_trace
from sglang_ares.srt.policy.admission import ADMISSIONS
from sglang_ares.srt.policy.registry import PLACEMENT, RESCHEDULING
from sglang_ares.srt.policy.snapshot import MEDIAN, Snapshot
from sglang_ares.srt.policy.types import LEVELS, Move, RescheduleLimits

SMALL = msgspec.structs.replace(load_profile("24gb-qwen2.5-7b"), kv_capacity_tokens=20_000)


def busy_stream(seed: int = 1, rate: float = 2.0) -> RequestStream:
    return lognormal(rate=rate, duration_s=120, seed=seed, output_mean=600, output_cv=1.5, cap=8000)


def tight(**changes: Any) -> SimulationConfig:
    return dataclasses.replace(SimulationConfig(decode_workers=4, profile=SMALL), **changes)


@pytest.mark.parametrize("placement", PLACEMENT.names())
@pytest.mark.parametrize("admission", ADMISSIONS)
@pytest.mark.parametrize("rescheduling", RESCHEDULING.names())
def test_every_request_ends_once_and_policies_are_deterministic(
    placement: str, admission: str, rescheduling: str
) -> None:
    stream = busy_stream()
    config = tight(
        placement=placement,
        admission=admission,
        ttft_slo_ms=2000.0,
        rescheduling=rescheduling,
        prediction="true" if rescheduling == "oracle" else "noisy",
    )
    one, two = Simulation(config, stream).run(), Simulation(config, stream).run()
    served = ~np.isnan(one.finished_s)
    fits = stream.prompt_tokens + stream.output_tokens <= SMALL.kv_capacity_tokens
    np.testing.assert_array_equal(served, fits)
    assert (one.first_token_s[served] > one.arrival_s[served]).all()
    assert (one.finished_s[served] >= one.first_token_s[served]).all()
    assert (one.sample_tokens <= SMALL.kv_capacity_tokens).all()
    np.testing.assert_array_equal(one.finished_s, two.finished_s)
    assert one.counters == two.counters


def test_other_seeds_are_other_predictions() -> None:
    predictions = [
        Noisy(ErrorModel(), 1.0, seed).remaining(np.arange(5), np.arange(5), np.full(5, 1000))
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(predictions[0], predictions[1])
    assert (predictions[0] != predictions[2]).all()


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32), moves=st.integers(1, 12))
def test_stays_add_up_to_the_output_wherever_requests_are_sent(seed: int, moves: int) -> None:
    """Random moves: every token is produced by exactly one stay, and stays never overlap."""
    config = tight(rescheduling="reactive", record_stays=True, reschedule_interval_s=0.5)
    simulation = Simulation(config, busy_stream(seed))
    rng = np.random.default_rng(seed)

    def at_random(cluster: Snapshot, limits: RescheduleLimits) -> tuple[Move, ...]:
        requests = cluster.requests
        rows = rng.permutation(np.flatnonzero(requests.movable))[:moves]
        sources = requests.worker[rows]
        targets = (sources + rng.integers(1, 4, len(rows))) % 4
        return tuple(
            Move(rid=requests.rids[int(r)], source=int(s), target=int(t))
            for r, s, t in zip(rows, sources, targets)
        )

    simulation._plan = at_random
    result = simulation.run()
    assert result.counters["migrations"] > 0
    assert result.moves.sum() == result.counters["migrations"]
    by_request: dict[int, list[str]] = {}
    assert result.stays is not None
    last_end: dict[int, float] = {}
    for stay in result.stays:
        assert stay.start_s >= last_end.get(stay.request, -math.inf)
        last_end[stay.request] = stay.end_s
        by_request.setdefault(stay.request, []).append(stay.end)
    for request, ends in by_request.items():
        assert ends.count("finished") == 1 and ends[-1] == "finished"
        assert ends.count("moved") == result.moves[request]
        assert ends.count("retracted") == result.retractions[request]
    served = ~np.isnan(result.finished_s)
    assert served.all()


def test_policies_see_the_cluster_as_it_is() -> None:
    """The columns agree with the requests' own arithmetic, and the truth with the prediction."""
    config = tight(rescheduling="reactive", prediction="true", reschedule_interval_s=5.0)
    stream = busy_stream()
    simulation = Simulation(config, stream)
    seen: list[Snapshot] = []

    def look(cluster: Snapshot, limits: RescheduleLimits) -> tuple[Move, ...]:
        assert limits.cost.tokens_per_s == pytest.approx(SMALL.link_tokens_per_s)
        seen.append(cluster)
        return ()

    simulation._plan = look
    result = simulation.run()
    assert len(seen) > 20
    for index, cluster in enumerate(seen):
        now = 5.0 * (index + 1)
        requests, workers = cluster.requests, cluster.workers
        numbers = np.array([int(requests.rids[i]) for i in range(len(requests))], np.int64)
        running = (result.first_token_s <= now - 0.1) & (result.finished_s > now + 0.1)
        running &= result.retractions == 0
        assert set(np.flatnonzero(running)) <= set(numbers)
        np.testing.assert_array_equal(requests.worker, result.worker[numbers])
        np.testing.assert_array_equal(
            requests.tokens, stream.prompt_tokens[numbers] + requests.output_tokens
        )
        true = stream.output_tokens[numbers] - requests.output_tokens
        np.testing.assert_array_equal(requests.remaining[:, MEDIAN], true)
        assert (true >= 0).all() and (requests.output_tokens >= 1).all()
        held = np.bincount(requests.worker, weights=requests.tokens, minlength=4)
        assert (held <= workers.kv_tokens).all()
        sums = np.bincount(requests.worker, weights=true, minlength=4)
        assert (workers.remaining_tokens >= sums - 1e-6).all()
        assert (workers.kv_tokens <= workers.kv_capacity).all()


def test_a_move_costs_its_pause() -> None:
    """One request, one forced move: the gap it leaves is the rest of a step, pause and a step."""
    stream = RequestStream(
        name="one",
        origin="one",
        arrival_s=np.array([0.0]),
        prompt_tokens=np.array([1000]),
        output_tokens=np.array([400]),
    )
    config = tight(rescheduling="reactive", reschedule_interval_s=3.0, decode_workers=2)
    simulation = Simulation(config, stream)
    plans = iter([(Move(rid="0", source=0, target=1),)])
    simulation._plan = lambda cluster, limits: next(plans, ())
    moved = simulation.run()
    stayed = Simulation(tight(decode_workers=2), stream).run()
    assert moved.worker.tolist() == [1] and moved.moves.tolist() == [1]
    pause_s = SMALL.move_pause_ms / 1e3
    extra = moved.finished_s[0] - stayed.finished_s[0]
    assert extra == pytest.approx(pause_s, abs=1e-9)
    step_s = SMALL.decode.ms(1, 1200) / 1e3
    assert moved.longest_gap_s[0] == pytest.approx(pause_s + step_s, rel=0.01)


def test_free_moves_cost_nothing() -> None:
    config = tight(rescheduling="reactive", free_moves=True)
    assert config.limits.cost.seconds(1e9) == 0.0
    assert Simulation(config, busy_stream()).run().counters["migrations"] > 0


def test_a_request_that_can_never_fit_is_rejected_and_misses_its_slo() -> None:
    stream = RequestStream(
        name="two",
        origin="two",
        arrival_s=np.array([0.0, 1.0]),
        prompt_tokens=np.array([19_990, 10]),
        output_tokens=np.array([11, 10]),
    )
    result = Simulation(tight(tpot_slo_ms=1000.0), stream).run()
    assert result.worker[0] == -1 and result.worker[1] >= 0
    assert result.summary()["rejected"] == 1
    assert result.attainment() == 0.5


def test_figures() -> None:
    result = Simulation(
        tight(ttft_slo_ms=100.0, tpot_slo_ms=20.5, warmup_s=20.0), busy_stream()
    ).run()
    summary = result.summary()
    late = result.arrival_s >= 20
    assert summary["requests"] == late.sum()
    tpot = (result.finished_s - result.first_token_s)[late] / (result.output_tokens - 1)[late]
    assert summary["tpot_ms"]["p99"] == pytest.approx(1e3 * np.nanpercentile(tpot, 99))
    assert summary["ttft_ms"]["mean"] == pytest.approx(
        1e3 * (result.first_token_s - result.arrival_s)[late].mean()
    )
    slo = summary["slo"]
    assert 0 < slo["attainment"] <= min(slo["ttft_attainment"], slo["tpot_attainment"]) < 1
    assert summary["imbalance"]["max_over_mean"] >= 1
    document = json.loads(json.dumps(result.to_dict(raw=True)))
    assert document["config"]["profile"]["name"] == "24gb-qwen2.5-7b"
    assert len(document["raw"]["finished_s"]) == len(result)


def test_a_stream_without_requests() -> None:
    empty = RequestStream("none", "none", np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64))
    result = Simulation(tight(rescheduling="reactive"), empty).run()
    assert len(result) == 0
    assert result.summary()["tpot_ms"] is None
    assert result.attainment() == 1.0


def test_noise_is_as_wide_as_its_model_says_and_calibrated() -> None:
    model = ErrorModel(sigma_start=0.6, sigma_end=0.2, decay_tokens=1000, source="test")
    count = 40_000
    for done, sigma in ((0, 0.6), (100_000, 0.2)):
        predicted = Noisy(model, 1.0, 7).remaining(
            np.arange(count), np.full(count, done), np.full(count, 5000)
        )
        logs = np.log(predicted[:, MEDIAN] / 5000)
        assert logs.std() == pytest.approx(sigma, rel=0.03)
        assert abs(logs.mean()) < 0.02
        for column, level in enumerate(LEVELS):
            assert (predicted[:, column] >= 5000).mean() == pytest.approx(level, abs=0.02)


def test_errors_last() -> None:
    """Errors a few tokens apart are alike, far apart they share the persistent part."""
    model = ErrorModel(sigma_start=0.5, sigma_end=0.5, persistence=0.5, correlation_tokens=100)
    requests, remaining = np.arange(20_000), np.full(20_000, 1000)

    def logs(done: int) -> np.ndarray:
        noisy = Noisy(model, 1.0, 3).remaining(requests, np.full(20_000, done), remaining)
        return np.log(noisy[:, MEDIAN])

    assert np.corrcoef(logs(1000), logs(1010))[0, 1] > 0.95
    assert np.corrcoef(logs(1000), logs(5000))[0, 1] == pytest.approx(0.5, abs=0.03)


def test_a_scale_of_zero_is_the_truth() -> None:
    arguments = (np.arange(9), np.arange(9), np.arange(9) * 100)
    exact = Noisy(ErrorModel(), 0.0, 1).remaining(*arguments)
    np.testing.assert_allclose(exact, Truth().remaining(*arguments))


def test_error_models_from_files(tmp_path: Path) -> None:
    path = tmp_path / "error.json"
    path.write_text('{"sigma_start": 1.5, "source": "measured"}')
    assert load_error_model(path).sigma_start == 1.5
    path.write_text('{"sigma_end": 1,\n"sigma_start": -1}')
    with pytest.raises(ValueError, match=r"error\.json, line 2: sigma_start: .*>= 0"):
        load_error_model(path)
    with pytest.raises(ValueError, match=r"absent\.json: cannot be read: No such file"):
        load_error_model(tmp_path / "absent.json")


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"decode_workers": 0}, "decode_workers is 0"),
        ({"rescheduling": "best"}, "choose one of: .*reactive"),
        ({"prediction": "mind"}, "prediction is 'mind'"),
        ({"report_interval_s": 0.0}, "report_interval_s"),
        ({"error_scale": -1.0}, "error_scale"),
        ({"tpot_slo_ms": math.nan}, "tpot_slo_ms"),
    ],
)
def test_configurations_that_make_no_sense(changes: dict[str, object], text: str) -> None:
    with pytest.raises(SimulationError, match=text):
        tight(**changes)


def test_shipped_profiles_say_where_they_are_from() -> None:
    assert len(shipped_profiles()) >= 2
    for name in shipped_profiles():
        assert "not measured" in load_profile(name).source


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('"per_token_ms": 7', '"per_token_ms": -7', r"line 9: decode\.per_token_ms: .*>= 0"),
        ('"per_square_ms"', '"per_cube_ms"', r"line 14: prefill: .*unknown field `per_cube_ms`"),
        ('"max_running": 256', '"max_running": 0', r"line 22: max_running: .*>= 1"),
        ('"fixed_ms": 19.85,', "", r"line 6: decode: .*missing required field `fixed_ms`"),
        ('"max_running": 256,', "", r"line 1: .*missing required field `max_running`"),
        ('"max_running": 256,', '"max_running": 256', r"line 23: .*malformed"),
    ],
)
def test_profiles_that_are_wrong(tmp_path: Path, old: str, new: str, message: str) -> None:
    """The error names file, line and field."""
    text = json.dumps(json.loads(msgspec.json.encode(SMALL)), indent=1)
    assert text.count(old) == 1
    path = tmp_path / "broken.json"
    path.write_text(text.replace(old, new))
    with pytest.raises(ProfileError, match=rf"broken\.json, {message}"):
        load_profile(path)


def traced() -> Result:
    return Simulation(tight(rescheduling="reactive", record_stays=True), busy_stream()).run()


def test_traces_and_pictures(tmp_path: Path) -> None:
    result = traced()
    write_trace(tmp_path / "trace.json", result)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert events == list(trace_events(result))
    assert sum(e["ph"] == "s" for e in events) == result.counters["migrations"] > 0
    plot_load(tmp_path / "load.png", {"reactive": result})
    assert (tmp_path / "load.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="record_stays"):
        list(trace_events(Simulation(tight(), busy_stream()).run()))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--decode-workers 3 --rate 2 --duration 30 --rescheduling reactive --seed 5 --raw"
    files = [f"--{kind}={tmp_path / kind}.out" for kind in ("json", "trace")]
    picture = f"--plot={tmp_path / 'load.png'}"
    assert simulate.main([*flags.split(), *files, picture, "--tpot-slo-ms=40"]) == 0
    document = json.loads((tmp_path / "json.out").read_text())
    assert document["config"]["decode_workers"] == 3
    assert document["summary"]["requests"] == len(document["raw"]["arrival_s"])
    shown = capsys.readouterr().out
    assert "tpot_ms" in shown and "SLOs met" in shown


def test_the_command_names_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate.main(["--workload", "nothing.csv"]) == 2
    assert "neither a file nor one of: reasoning" in capsys.readouterr().err
    assert simulate.main(["--profile", "nothing"]) == 2
    assert "there is no profile 'nothing'" in capsys.readouterr().err
    for flag in ("--prompt-mean", "--output-mean", "--output-cv"):
        assert simulate.main([flag, "2"]) == 2
        assert "--workload lognormal" in capsys.readouterr().err
