"""Laws on disk, how the controller keeps them, and fits that begin with one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ares.ares_args import AresArgs
from sglang_ares.profiles.laws import LawFile, Laws
from sglang_ares.profiles.profile import PrefillTime
from sglang_ares.srt.managers.cluster_state import ClusterState
from sglang_ares.srt.managers.law_keeper import LawKeeper, cache_key
from sglang_ares.srt.policy.prefill_time import PrefillTimeFit
from sglang_ares.srt.policy.step_time import StepTimeFit
from sglang_ares.srt.policy.types import StepTime
from unit.test_role_planner import D2, D3, P0, new_state, report

PREFILL_LAW = PrefillTime(fixed_ms=8.0, per_token_ms=0.05, per_square_ms=2e-5)
STEP_LAW = StepTime(fixed_ms=10.0, per_request_ms=0.2, per_token_ms=1e-3)
LAWS = Laws(prefill=PREFILL_LAW, decode=STEP_LAW)
KEY = {"--model-path": "sha256:1", "hardware": "a CPU"}

MS = st.floats(0, 1e6)
PREFILLS = st.builds(PrefillTime, fixed_ms=MS, per_token_ms=MS, per_square_ms=MS)
STEPS = st.builds(StepTime, fixed_ms=MS, per_request_ms=MS, per_token_ms=MS)


# --- the file -------------------------------------------------------------------------------


def test_what_was_written_is_read(tmp_path: Path) -> None:
    file = LawFile(tmp_path / "not" / "there", "org/some model", KEY)
    assert file.read() is None
    file.write(LAWS)
    assert LawFile(tmp_path / "not" / "there", "org/some model", dict(KEY)).read() == LAWS
    assert [p.name for p in file.path.parent.iterdir()] == [file.path.name], "nothing is left over"
    assert file.path.name.startswith("org-some-model-")


def test_other_settings_have_a_file_of_their_own(tmp_path: Path) -> None:
    LawFile(tmp_path, "m", KEY).write(LAWS)
    for other in ({**KEY, "hardware": "a GPU"}, {**KEY, "--tp-size": "2"}, {}):
        assert LawFile(tmp_path, "m", other).read() is None


@given(prefill=st.none() | PREFILLS, decode=st.none() | STEPS)
def test_any_laws_survive_the_disk(
    tmp_path_factory: pytest.TempPathFactory, prefill: PrefillTime | None, decode: StepTime | None
) -> None:
    laws = Laws(prefill=prefill, decode=decode)
    file = LawFile(tmp_path_factory.mktemp("laws"), "m", KEY)
    file.write(laws)
    credible = (prefill is None or prefill.ms(1024) > 0) and (
        decode is None or decode.ms(8, 4096) > 0
    )
    assert file.read() == (laws if credible else None)


def content(**changes: Any) -> bytes:
    """A file as it is written, with ``changes``."""
    fields = {"key": KEY, "saved_at": "2026", "laws": msgspec.to_builtins(LAWS)}
    return msgspec.json.encode({**fields, **changes})


@pytest.mark.parametrize(
    "body,why",
    [
        (b"", "truncated"),
        (content()[:-20], "truncated"),
        (b"\xff\xfe\x00", ""),
        (content(laws={"prefill": {"fixed_ms": -1.0}}), "fixed_ms"),
        (content(laws={"decode": {"fixed_ms": 0, "per_request_ms": 0, "per_token_ms": 0}}), "time"),
        (content(more=1), "more"),
        (content(key={"hardware": "another"}), "other settings"),
    ],
)
def test_a_file_that_cannot_be_believed_is_named_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, body: bytes, why: str
) -> None:
    file = LawFile(tmp_path, "m", KEY)
    file.path.write_bytes(body)
    with caplog.at_level(logging.WARNING):
        keeper = LawKeeper(file)
    assert str(file.path) in caplog.text and why in caplog.text
    assert keeper.current == Laws() and keeper.source == "none"
    state = new_state()
    keeper.on_report(report(state, P0, prefill_law=(5.0, 0.1, 0.0)))
    keeper.write_when_due(1.0)
    assert LawFile(tmp_path, "m", KEY).read() == keeper.current


def test_what_the_key_says() -> None:
    """Flags that change a step's time; the number of workers only where they share cores."""
    settings = {"--dtype": "'bfloat16'"}
    gpu = cache_key(settings, "H100", "cuda", AresArgs())
    assert gpu["--dtype"] == "'bfloat16'" and gpu["hardware"] == "H100"
    assert gpu == cache_key(settings, "H100", "cuda", AresArgs(decode_workers=7))
    assert gpu != cache_key(settings, "H100", "cuda", AresArgs(predictor="off"))
    assert gpu != cache_key({}, "H100", "cuda", AresArgs())
    assert gpu != cache_key(settings, "H200", "cuda", AresArgs())
    assert cache_key(settings, "x", "cpu", AresArgs()) != cache_key(
        settings, "x", "cpu", AresArgs(decode_workers=7)
    )


# --- the keeper -----------------------------------------------------------------------------


@pytest.fixture
def state() -> ClusterState:
    return new_state()


def test_reports_refresh_and_a_restarted_worker_begins_with_them(
    tmp_path: Path, state: ClusterState
) -> None:
    file = LawFile(tmp_path, "m", KEY)
    file.write(LAWS)
    keeper = LawKeeper(file)
    assert keeper.source == "cache" and keeper.for_worker() == LAWS
    keeper.on_report(report(state, D2, (10,), step=STEP_LAW))
    assert keeper.current == LAWS, "what it was given is no news"
    own = StepTime(fixed_ms=20.0, per_request_ms=1.0, per_token_ms=0.0)
    keeper.on_report(report(state, D2, (10,), step=own))
    assert keeper.current.decode == own, "a worker that has found nothing does not dilute it"
    other = StepTime(fixed_ms=40.0, per_request_ms=3.0, per_token_ms=0.0)
    keeper.on_report(report(state, D3, (10,), step=other))
    assert keeper.current.decode == StepTime(fixed_ms=30.0, per_request_ms=2.0, per_token_ms=0.0)
    keeper.on_report(report(state, P0, (10,), prefill_law=(1.0, 2.0, 3.0)))
    assert keeper.for_worker() == keeper.current
    keeper.on_report(report(state, D3, (10,), step=keeper.current.decode))
    assert keeper.current.decode == StepTime(fixed_ms=30.0, per_request_ms=2.0, per_token_ms=0.0)


def test_laws_from_one_length_or_load_are_not_kept(state: ClusterState) -> None:
    """Prompts of 8 tokens say nothing of 8,000, and the next start is to measure."""
    keeper = LawKeeper(None)
    fit = PrefillTimeFit()
    for _ in range(9):
        fit.observe([(0, 8)], 40.0)
    law = fit.law()
    assert law is not None and law.ms(8000) == pytest.approx(40_000.0), "in proportion, no square"
    told = (law.fixed_ms, law.per_token_ms, law.per_square_ms)
    keeper.on_report(report(state, P0, prefill_law=told))
    constant = StepTime(fixed_ms=20.0, per_request_ms=0.0, per_token_ms=0.0)
    keeper.on_report(report(state, D2, (10,), step=constant))
    assert keeper.current == Laws()


def test_laws_of_a_role_that_a_worker_has_not_are_left_alone(state: ClusterState) -> None:
    keeper = LawKeeper(None)
    keeper.on_report(report(state, P0, step=STEP_LAW))
    keeper.on_report(report(state, D2, prefill_law=(1.0, 1.0, 1.0)))
    assert keeper.current == Laws()


def test_it_writes_once_a_minute_and_only_what_changed(tmp_path: Path, state: ClusterState) -> None:
    file = LawFile(tmp_path, "m", KEY)
    keeper = LawKeeper(file)
    keeper.write_when_due(0.0)
    assert not file.path.exists()
    keeper.on_report(report(state, P0, prefill_law=(10.0, 0.1, 0.0)))
    keeper.write_when_due(1.0)
    first = file.read()
    assert first is not None and first.prefill is not None and first.prefill.fixed_ms == 10.0
    keeper.on_report(report(state, P0, prefill_law=(20.0, 0.2, 0.0)))
    keeper.write_when_due(60.0)
    assert file.read() == first
    keeper.write_when_due(61.0)
    second = file.read()
    assert second == keeper.current
    keeper.on_report(report(state, P0, prefill_law=(20.1, 0.2, 0.0)))
    keeper.write_when_due(500.0)
    assert file.read() == second, "half a percent is noise"
    keeper.write()
    assert file.read() == keeper.current, "at the end it is kept all the same"


def test_a_disk_that_cannot_be_written_to_costs_one_warning(
    tmp_path: Path, state: ClusterState, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").write_text("")
    keeper = LawKeeper(LawFile(tmp_path / "taken", "m", KEY))
    caplog.clear()
    for ms in (1.0, 50.0):
        keeper.on_report(report(state, P0, prefill_law=(ms, 0.1, 0.0)))
        keeper.write_when_due(100 * ms)
    assert caplog.text.count("--ares-profile-cache") == 1
    assert keeper.current.prefill is not None, "they are known all the same"


def test_an_emulated_cluster_knows_its_laws_and_keeps_nothing(tmp_path: Path) -> None:
    file = LawFile(tmp_path, "m", KEY)
    keeper = LawKeeper(file, LAWS.scaled(3.0))
    assert keeper.source == "emulated" and keeper.for_worker().complete
    assert keeper.current.decode is not None and keeper.current.decode.fixed_ms == 30.0
    assert keeper.status()["file"] is None
    keeper.write()
    assert not file.path.exists()


@given(PREFILLS, STEPS, st.floats(0.01, 100))
def test_scaled_laws_tell_scaled_times(prefill: PrefillTime, step: StepTime, by: float) -> None:
    laws = Laws(prefill=prefill, decode=step).scaled(by)
    assert laws.prefill is not None and laws.decode is not None
    assert laws.prefill.ms(300) == pytest.approx(by * prefill.ms(300))
    assert laws.decode.ms(3, 300) == pytest.approx(by * step.ms(3, 300))


@pytest.mark.parametrize("factor,differs", [(1.0, False), (1.01, False), (1.1, True), (0.9, True)])
def test_differences(factor: float, differs: bool) -> None:
    assert LAWS.scaled(factor).differs_from(LAWS, 0.02) is differs
    assert Laws(decode=STEP_LAW).differs_from(LAWS, 0.02)


# --- fits that begin with a law -------------------------------------------------------------


def test_a_prior_holds_until_there_is_a_law_of_its_own() -> None:
    fit = StepTimeFit(STEP_LAW)
    assert fit.law() == STEP_LAW
    for _ in range(300):
        fit.observe(8, 8000, 99.0)
    assert fit.law() == STEP_LAW, "steps that are too much alike say nothing"
    twice = Laws(decode=STEP_LAW).scaled(2.0).decode
    assert twice is not None
    for i in range(600):
        n, t = 1 + i % 40, 100 * (1 + i % 23)
        fit.observe(n, t, twice.ms(n, t))
    found = fit.law()
    assert found is not None
    for n, t in ((2, 300), (20, 1500), (40, 2300)):
        assert found.ms(n, t) == pytest.approx(twice.ms(n, t), rel=0.03), "own steps outweigh it"


def test_a_prior_decides_what_batches_that_are_alike_leave_open() -> None:
    """Five prompts of one length; without a prior nothing is known of longer ones."""
    fit, blind = PrefillTimeFit(PREFILL_LAW), PrefillTimeFit()
    assert fit.law() is None, "a prior is not told as the worker's own"
    for _ in range(5):
        fit.observe([(0, 100)], PREFILL_LAW.ms(100))
        blind.observe([(0, 100)], PREFILL_LAW.ms(100))
    found, guessed = fit.law(), blind.law()
    assert found is not None and guessed is not None
    assert found.ms(1000) == pytest.approx(PREFILL_LAW.ms(1000), rel=0.01)
    assert abs(guessed.ms(1000) / PREFILL_LAW.ms(1000) - 1) > 0.1


def test_own_prompts_outweigh_a_wrong_prior() -> None:
    wrong = Laws(prefill=PREFILL_LAW).scaled(3.0).prefill
    fit = PrefillTimeFit(wrong)
    for tokens in (64, 200, 700, 2000, 5000) * 5:
        fit.observe([(0, tokens)], PREFILL_LAW.ms(tokens))
    found = fit.law()
    assert found is not None
    for tokens in (64, 700, 5000):
        assert found.ms(tokens) == pytest.approx(PREFILL_LAW.ms(tokens), rel=0.1)
