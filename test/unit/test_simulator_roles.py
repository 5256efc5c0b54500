"""Simulated changes of roles: nothing is lost, no role dies out, steps take what they should."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from sglang_ares import simulate
from sglang_ares.bench.workloads import RequestStream
from sglang_ares.bench.workloads.synthetic import lognormal, swing
from sglang_ares.profiles.profile import load_profile
from sglang_ares.simulator import Result, Simulation, SimulationConfig
from sglang_ares.simulator.config import SimulationError
from sglang_ares.simulator.goodput import try_rate
from sglang_ares.simulator.roles import RolesConfig
from sglang_ares.simulator.roles.config import COLOCATED, EMPTY, RELABEL, RolesError
from sglang_ares.simulator.roles.history import offered_load
from sglang_ares.simulator.roles.plot import plot_roles
from sglang_ares.simulator.roles.simulation import RolesSimulation
from sglang_ares.simulator.roles.worker import ElasticWorker
from sglang_ares.srt.policy.elastic.instances import Slo
from sglang_ares.srt.policy.types import DECODE, PREFILL

PROFILE = load_profile("24gb-qwen2.5-7b")
# Short of memory: requests wait, and some are retracted.
TIGHT = msgspec.structs.replace(PROFILE, kv_capacity_tokens=20_000)
KINDS = [
    ("static", EMPTY),
    ("arrow", RELABEL),
    ("arrow", EMPTY),
    ("ares", RELABEL),
    ("ares", EMPTY),
    (COLOCATED, ""),
]


def settings(policy: str, change: str = "", **changes: Any) -> SimulationConfig:
    """Eight workers, four of each role."""
    values = {
        "prefill_workers": 4,
        "decode_workers": 4,
        "ttft_slo_ms": 5000.0,
        "tpot_slo_ms": 100.0,
        "roles": RolesConfig(policy=policy, change=change),
        **changes,
    }
    return SimulationConfig(**values)


def swinging(seed: int = 1, rate: float = 4.0, duration_s: float = 240.0) -> RequestStream:
    return swing(rate=rate, duration_s=duration_s, seed=seed, period_s=120.0)


def some_stream(count: int, gap_s: float, seed: int) -> RequestStream:
    rng = np.random.default_rng(seed)
    return RequestStream(
        name="drawn",
        origin=f"seed {seed}",
        arrival_s=np.cumsum(rng.exponential(gap_s, count)),
        prompt_tokens=rng.integers(1, 9000, count),
        output_tokens=rng.integers(2, 400, count),
    )


# --- conservation ---------------------------------------------------------------------------


@pytest.mark.parametrize("policy, change", KINDS)
@pytest.mark.parametrize("tight", [False, True])
def test_every_request_ends_once_and_all_memory_comes_back(
    policy: str, change: str, tight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = swinging(rate=2.0 if tight else 4.0)
    config = settings(policy, change, profile=TIGHT if tight else PROFILE, record_stays=True)
    simulation = RolesSimulation(config, stream)
    roles = simulation._roles
    pass_ = simulation._pass

    def look(x: int, y: int) -> None:
        pass_(x, y)
        if policy != COLOCATED:
            assert len(roles.serving(decodes=True)) and len(roles.serving(decodes=False))
        for worker in simulation._pool.elastic:
            assert 0 <= worker.held <= worker.promised
            assert worker.promised + worker.tokens <= worker.capacity

    monkeypatch.setattr(simulation, "_pass", look)
    result = simulation.run()
    fits = stream.prompt_tokens + stream.output_tokens <= config.profile.kv_capacity_tokens
    np.testing.assert_array_equal(~np.isnan(result.finished_s), fits)
    assert (result.first_token_s[fits] > result.arrival_s[fits]).all()
    assert (result.finished_s[fits] >= result.first_token_s[fits]).all()
    for worker in simulation._pool.elastic:
        assert (worker.promised, worker.held, worker.tokens, worker.coming) == (0, 0, 0, 0)
        assert (worker.prompts, worker.allocated, worker.queued_tokens) == (0, 0, 0)
        assert not worker.running and not worker.queue and not worker.waiting
    pool = simulation._pool
    assert not pool.source and not pool.waits and not simulation._migrations.under_way
    assert result.stays is not None and result.roles is not None
    ends = Counter((stay.request, stay.end) for stay in result.stays)
    for request in np.flatnonzero(fits & (stream.output_tokens > 1)).tolist():
        assert ends[request, "finished"] == 1
        assert ends[request, "moved"] == result.moves[request]
        assert ends[request, "retracted"] == result.retractions[request]
    assert (result.roles.pools.sum(axis=1) == 8).all()


@pytest.mark.parametrize("policy, change", KINDS)
def test_the_same_requests_give_the_same_result(policy: str, change: str) -> None:
    one, two = (RolesSimulation(settings(policy, change), swinging()).run() for _ in range(2))
    np.testing.assert_array_equal(one.finished_s, two.finished_s)
    assert one.counters == two.counters
    assert one.roles is not None and two.roles is not None
    assert one.roles.to_dict() == two.roles.to_dict()


# --- against the simulator without roles ----------------------------------------------------


@pytest.mark.parametrize("prefill, decode", [(1, 1), (4, 1), (1, 5)])
@pytest.mark.parametrize("seed", [1, 2])
def test_fixed_roles_are_the_simulator_without_roles(prefill: int, decode: int, seed: int) -> None:
    """Where the orders of placing coincide: prompts in turn, memory for all, and one prefill or one
    decode worker. The client's first token comes with the prompt here, with the KV's arrival
    there; nothing else may differ, to the last bit."""
    roomy = msgspec.structs.replace(PROFILE, kv_capacity_tokens=10**9, max_running=10**6)
    fixed = SimulationConfig(
        prefill_workers=prefill,
        decode_workers=decode,
        profile=roomy,
        placement="round_robin",
        prefill_placement="round_robin",
        ttft_slo_ms=5000.0,
        tpot_slo_ms=100.0,
    )
    elastic = replace(fixed, roles=RolesConfig(policy="static", scheduling="round_robin"))
    stream = some_stream(300, 0.15, seed)
    expected, found = Simulation(fixed, stream).run(), RolesSimulation(elastic, stream).run()
    np.testing.assert_array_equal(found.prefilled_s, expected.prefilled_s)
    np.testing.assert_array_equal(found.finished_s, expected.finished_s)
    np.testing.assert_array_equal(found.worker - prefill, expected.worker)
    np.testing.assert_array_equal(found.first_token_s, found.prefilled_s)
    assert found.counters["flips"] == 0


# --- changes --------------------------------------------------------------------------------


@pytest.mark.parametrize("policy, change", [k for k in KINDS if k[0] in ("arrow", "ares")])
def test_roles_change_both_ways_when_the_mix_swings(policy: str, change: str) -> None:
    result = RolesSimulation(settings(policy, change), swinging(duration_s=480.0)).run()
    assert result.roles is not None
    done = Counter(flip.role for flip in result.roles.flips if flip.done_s is not None)
    assert done[PREFILL] and done[DECODE]
    assert all(flip.reason for flip in result.roles.flips)


def test_an_emptied_worker_loses_its_requests_to_the_others_before_it_changes() -> None:
    config = settings("static", EMPTY, sample_interval_s=0.05)
    simulation = RolesSimulation(config, lognormal(rate=4, duration_s=60, seed=1))
    state: dict[str, Any] = {}
    changed = simulation._roles.changed

    def order(x: int, y: int) -> None:
        if simulation._events.now > 30 and not state:
            state["held"] = len(simulation._pool.elastic[5].running)
            state["flip"] = simulation._roles.flip(5, to_decode=False, cause="test", reason="test")

    simulation._pass = order  # type: ignore[method-assign]
    simulation._events.push(31.0, 18)
    simulation._roles.changed = lambda row, change: (  # type: ignore[method-assign]
        state.update(left=len(simulation._pool.elastic[row].running)),
        changed(row, change),
    )[1]
    result = simulation.run()
    assert state["flip"] and state["held"] > 5 and state["left"] == 0
    assert result.counters["migrations"] >= state["held"] - 5
    assert result.roles is not None
    (flip,) = result.roles.flips
    assert flip.outcome == "changed" and flip.done_s is not None
    assert flip.done_s - flip.start_s >= 0.05 + PROFILE.move_fixed_ms / 1e3
    assert not np.isnan(result.finished_s).any()


def test_a_change_is_refused_without_room_and_for_the_last_of_a_role() -> None:
    config = settings("static", EMPTY, profile=TIGHT)
    simulation = RolesSimulation(config, swinging())
    roles, workers = simulation._roles, simulation._pool.elastic
    workers[4].tokens = 19_000
    for row in (5, 6, 7):
        workers[row].tokens = 15_000
    assert not roles.flip(4, to_decode=False, cause="test", reason="test")
    assert roles.history.refused == {"the others have no room": 1}
    assert not roles.flip(5, to_decode=True, cause="test", reason="test")
    for row in range(4, 8):
        workers[row].tokens = 0
    assert roles.flip(4, to_decode=False, cause="test", reason="test")
    assert not roles.flip(5, to_decode=False, cause="test", reason="test")
    relabel = RolesSimulation(settings("static", RELABEL), swinging())._roles
    assert all(relabel.flip(r, to_decode=False, cause="test", reason="test") for r in (4, 5, 6))
    assert not relabel.flip(7, to_decode=False, cause="test", reason="test")
    assert relabel.history.refused == {"it is the last one of its role": 1}
    assert roles.history.refused["it has that role"] == 1
    assert roles.history.refused["others are changing"] == 1


# --- steps that decode and prefill ----------------------------------------------------------


def test_a_mixed_step_is_a_decode_step_longer_by_its_chunk() -> None:
    worker = ElasticWorker(
        PROFILE.decode, PROFILE.prefill, chunk_tokens=4096, mixed_tokens=300,
        capacity=100_000, max_running=64, reserved=512, gaps=[0.0] * 3,
    )  # fmt: skip
    worker.take(0, 1000, 50, 0.0)
    worker.take(1, 500, 50, 0.0)
    worker.add(2, 400)
    law, step = PROFILE.prefill, PROFILE.decode
    # Two of 300 tokens decode: the chunk has 298, then what is left of the prompt.
    for chunk, before, tokens in ((298, 0, 1500), (102, 298, 1502)):
        worker.plan_step()
        square = (before + chunk) ** 2 - before**2
        ms = step.ms(2, tokens) + law.per_token_ms * chunk + law.per_square_ms * square
        start = worker.clock
        assert worker.schedule() == pytest.approx(start + ms / 1e3)
        worker.advance(worker.due)
        assert worker.clock == pytest.approx(start + ms / 1e3)
        assert worker.queued_tokens == 400 - before - chunk
        assert worker.queued_ms == pytest.approx(
            law.ms(400, before + chunk) if worker.queue else 0.0
        )
    assert worker.computed == [2] and worker.held == 400 and worker.steps == 2
    worker.plan_step()
    assert worker.duration(1) == pytest.approx(step.ms(2, 1504) / 1e3)


def test_the_budget_of_mixed_steps_keeps_the_slo() -> None:
    roles = RolesConfig(policy=COLOCATED)
    tokens = roles.mixed_budget(PROFILE, 100.0)
    full_ms = PROFILE.decode.ms(0, PROFILE.kv_capacity_tokens)
    assert full_ms + tokens * PROFILE.prefill.per_token_ms == pytest.approx(90, abs=0.2)
    assert roles.mixed_budget(PROFILE, 1.0) == 64
    assert replace(roles, mixed_tokens=777).mixed_budget(PROFILE, 100.0) == 777


# --- figures, files, errors -----------------------------------------------------------------


def test_giving_up_tells_whether_the_share_is_met() -> None:
    for rate, meets in ((2.0, True), (9.0, False)):
        stream = swinging(rate=rate)
        whole = RolesSimulation(settings("static"), stream).run()
        short = RolesSimulation(settings("static"), stream, give_up_below=0.9).run()
        assert (whole.attainment() >= 0.9) == (short.attainment() >= 0.9) == meets
        if meets:
            np.testing.assert_array_equal(short.finished_s, whole.finished_s)
        else:
            assert np.isnan(short.finished_s).any()


def test_goodput_simulates_roles_when_they_are_configured() -> None:
    stream = swinging()
    point = try_rate(settings("ares"), stream, stream.rate)
    assert point.migrations == run("ares", stream).counters["migrations"] > 0


def run(policy: str, stream: RequestStream) -> Result:
    return RolesSimulation(settings(policy), stream).run()


def test_the_offered_load_is_work_per_second() -> None:
    stream = swinging()
    slo = Slo(ttft_ms=5000.0, tpot_ms=100.0)
    _, prefill, decode = offered_load(stream, PROFILE, slo, 10.0)
    work_ms = sum(PROFILE.prefill.ms(n) for n in stream.prompt_tokens.tolist())
    assert prefill.sum() * 10 == pytest.approx(work_ms / 1e3)
    middle = len(prefill) // 4
    assert prefill[:middle].mean() > 3 * prefill[middle : 2 * middle].mean()
    assert decode[:middle].mean() < decode[middle : 2 * middle].mean()


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: RolesConfig(policy="best"), "policy is 'best'; choose one of: .*arrow"),
        (lambda: RolesConfig(change="slowly"), "change is 'slowly'"),
        (lambda: RolesConfig(pass_s=0), "pass_s is 0"),
        (lambda: settings("ares", tpot_slo_ms=0.0), "set tpot_slo_ms"),
        (lambda: settings("ares", rescheduling="reactive"), "set rescheduling to 'none'"),
    ],
)
def test_settings_that_make_no_sense(make: Any, text: str) -> None:
    with pytest.raises((RolesError, SimulationError), match=text):
        make()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_file, picture = tmp_path / "run.json", tmp_path / "roles.png"
    flags = (
        "--prefill-workers 4 --decode-workers 4 --workload swing --rate 3 --duration 400 --seed 1 "
        "--ttft-slo-ms 5000 --tpot-slo-ms 100 --roles ares"
    )
    assert simulate.main([*flags.split(), f"--json={json_file}", f"--plot={picture}"]) == 0
    roles = json.loads(json_file.read_text())["roles"]
    assert roles["flips"] and {"start_s", "reason", "role", "done_s"} <= roles["flips"][0].keys()
    assert len(roles["pools"]["decode"]) == len(roles["sample_s"])
    assert picture.stat().st_size > 1000
    assert "changes of role" in capsys.readouterr().out
    assert simulate.main(["--roles", "ares"]) == 2
    assert "--ttft-slo-ms" in capsys.readouterr().err
    plain = Simulation(settings("static", roles=None), swinging()).run()
    with pytest.raises(ValueError, match="simulate with roles"):
        plot_roles(picture, {"fixed": plain})
