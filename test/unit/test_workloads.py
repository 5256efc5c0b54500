"""Workloads: built-in mixes, trace files good and bad, the published traces where they are."""

from __future__ import annotations

import gzip
import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ares.bench.workloads import (
    RequestStream,
    ServeGen,
    WorkloadError,
    arrivals,
    load_azure2023,
    load_mooncake,
    load_workload,
    lognormal,
    reasoning,
    swing,
)

DATA = Path(__file__).parents[3] / "shared" / "data"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"


def published(name: str) -> Path:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"the published trace is not at {path}")
    return path


def check(stream: RequestStream) -> None:
    """What every stream promises."""
    assert stream.arrival_s.dtype == np.float64
    assert stream.prompt_tokens.dtype == stream.output_tokens.dtype == np.int64
    assert (np.diff(stream.arrival_s) >= 0).all()
    assert stream.prompt_tokens.min() >= 1 and stream.output_tokens.min() >= 1
    assert len(stream) == len(stream.prompt_tokens) == len(stream.output_tokens)


def test_reasoning_has_the_published_shares() -> None:
    stream = reasoning(rate=20, duration_s=3000, seed=1)
    check(stream)
    outputs = stream.output_tokens
    assert (outputs < 1000).mean() == pytest.approx(0.292, abs=0.01)
    assert (outputs > 30_000).mean() == pytest.approx(0.173, abs=0.01)
    assert outputs.max() == 32768


@given(mean=st.floats(50, 3000), cv=st.floats(0.1, 1.5))
def test_lognormal_has_the_mean_and_spread_asked_for(mean: float, cv: float) -> None:
    stream = lognormal(rate=100, duration_s=300, seed=5, output_mean=mean, output_cv=cv, cap=10**7)
    check(stream)
    outputs = stream.output_tokens
    assert outputs.mean() == pytest.approx(mean, rel=0.08)
    assert outputs.std() / outputs.mean() == pytest.approx(cv, rel=0.25)


def test_swing_swings() -> None:
    stream = swing(rate=20, duration_s=1200, seed=1, period_s=400)
    check(stream)
    first = stream.arrival_s % 400 < 200
    assert stream.prompt_tokens[first].mean() > 5 * stream.prompt_tokens[~first].mean()
    assert stream.output_tokens[~first].mean() > 5 * stream.output_tokens[first].mean()


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_arrivals_have_the_rate_and_the_burstiness_asked_for(cv: float) -> None:
    times = arrivals(np.random.default_rng(1), rate=50, duration_s=2000, cv=cv)
    assert len(times) / 2000 == pytest.approx(50, rel=0.05)
    gaps = np.diff(times)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


@pytest.mark.parametrize("make", [reasoning, lognormal, swing])
def test_built_in_workloads_follow_their_seed(make: object) -> None:
    assert callable(make)
    one, two, other = (make(rate=5, duration_s=100, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.arrival_s, two.arrival_s)
    np.testing.assert_array_equal(one.output_tokens, two.output_tokens)
    assert one.arrival_s[0] != other.arrival_s[0]


def test_scaling_and_cutting() -> None:
    stream = lognormal(rate=4, duration_s=100, seed=2)
    faster = stream.scaled(0.5)
    assert faster.rate == pytest.approx(2 * stream.rate)
    np.testing.assert_array_equal(faster.output_tokens, stream.output_tokens)
    part = stream.between(20, 50)
    check(part)
    assert len(part) == ((stream.arrival_s >= 20) & (stream.arrival_s < 50)).sum()
    assert part.arrival_s[0] < 5 and part.arrival_s[-1] < 30
    assert stream.between(200, 300).rate == 0
    with pytest.raises(ValueError, match="factor is 0"):
        stream.scaled(0)


def test_azure(tmp_path: Path) -> None:
    text = AZURE + (
        "2023-11-16 18:15:46.6805900,374,44\r\n"
        "2023-11-16 18:15:50.9951690,396,109\r\n"
        "2023-11-16 18:16:50.9951691,5,0\r\n"
    )
    plain, packed = tmp_path / "a.csv", tmp_path / "a.csv.gz"
    plain.write_bytes(text.encode())
    packed.write_bytes(gzip.compress(text.encode()))
    for path in (plain, packed):
        stream = load_azure2023(path)
        check(stream)
        np.testing.assert_allclose(stream.arrival_s, [0, 4.314579, 64.3145791], atol=1e-9)
        assert stream.prompt_tokens.tolist() == [374, 396, 5]
        assert stream.output_tokens.tolist() == [44, 109, 1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("TIMESTAMP,ContextTokens\n", r"line 1: column GeneratedTokens is missing"),
        ("", r"line 1: column TIMESTAMP is missing"),
        (AZURE, "holds no requests"),
        (AZURE + "2023-11-16 18:15:46.1,374,-4\n", r"line 2: GeneratedTokens is '-4'"),
        (AZURE + "2023-11-16 18:15:46.1,x,4\n", r"line 2: ContextTokens is 'x'.*whole number"),
        (AZURE + "yesterday,3,4\n", r"line 2: TIMESTAMP is 'yesterday'"),
        (AZURE + "2023-11-16 18:15:46.1,3\n", r"line 2: 2 fields where the header has 3"),
        (
            AZURE + "2023-11-16 18:15:46.1,3,4\n\n2023-11-16 18:15:45.1,3,4\n",
            r"line 4: TIMESTAMP is earlier",
        ),
    ],
)
def test_azure_files_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(WorkloadError, match=rf"bad\.csv.*{message}"):
        load_azure2023(path)


def mooncake_line(**changes: object) -> str:
    record = {"timestamp": 3000, "input_length": 600, "output_length": 7, "hash_ids": [1, 2]}
    return json.dumps({**record, **changes}) + "\n"


def test_mooncake(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    lines = [mooncake_line(timestamp=3000 * (i // 10), hash_ids=[i]) for i in range(50)]
    path.write_text("".join(lines))
    stream = load_mooncake(path, seed=1)
    check(stream)
    assert stream.prefix_blocks is not None
    for place, (block,) in enumerate(stream.prefix_blocks):
        # Jittered within its 3 s; time starts at the first arrival, itself jittered.
        assert -3 <= stream.arrival_s[place] - 3 * (block // 10) < 3
    assert len(set(stream.arrival_s)) == 50
    np.testing.assert_array_equal(stream.arrival_s, load_mooncake(path, seed=1).arrival_s)
    assert (stream.arrival_s != load_mooncake(path, seed=2).arrival_s).any()


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", r"line 1: not JSON"),
        ("[]", r"line 1: field timestamp is missing"),
        ('{"timestamp": 1, "input_length": 1, "hash_ids": []}', r"field output_length is missing"),
        (mooncake_line(input_length=-1), r"line 1: input_length is -1"),
        (mooncake_line(output_length=1.5), r"line 1: output_length is 1\.5"),
        (mooncake_line(timestamp=None), r"line 1: timestamp is None"),
        (mooncake_line(timestamp=math.inf), r"line 1: timestamp is inf"),
        (mooncake_line(hash_ids=3), r"line 1: hash_ids is not a list"),
        (mooncake_line() + mooncake_line(timestamp=0), r"line 2: timestamp is earlier"),
    ],
)
def test_mooncake_files_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(WorkloadError, match=rf"bad\.jsonl.*{message}"):
        load_mooncake(path, seed=1)


def archive(path: Path, **members: str) -> Path:
    """A ServeGen archive; two clients that are well unless ``members`` says otherwise."""
    lengths = {"input_tokens": "{10: 0.25, 20: 0.75}", "output_tokens": "{5: 1.0}"}
    idle = {"input_tokens": "{}", "output_tokens": "{}"}
    texts = {
        "chunk-0-trace.csv": "0,2.0,1.0,Gamma,1.0,0.5\n600,1.0,1.0,Weibull,0.8,1.0\n",
        "chunk-0-dataset.json": json.dumps({"0": lengths}),
        "chunk-7-trace.csv": "0,0,0,,0,0\n600,3.0,1.0,Gamma,0.5,0.6\n",
        "chunk-7-dataset.json": json.dumps({"0": idle, "600": lengths}),
    }
    texts.update({name.replace("_", "-", 2).replace("_", "."): t for name, t in members.items()})
    with tarfile.open(path, "w:gz") as tar:
        for name, text in texts.items():
            if text:
                info = tarfile.TarInfo(f"data/reason/{name}")
                info.size = len(text.encode())
                tar.addfile(info, io.BytesIO(text.encode()))
    return path


def test_servegen(tmp_path: Path) -> None:
    generator = ServeGen(archive(tmp_path / "s.tar.gz"))
    assert generator.day_s == 1200
    assert generator.rate(0, 600) == 2.0
    assert generator.rate(300, 900) == pytest.approx(3.0)
    stream = generator.sample(seed=1)
    check(stream)
    early = stream.arrival_s < 600
    assert early.sum() == pytest.approx(1200, rel=0.1)
    assert (~early).sum() == pytest.approx(2400, rel=0.15)
    assert set(stream.prompt_tokens) == {10, 20} and set(stream.output_tokens) == {5}
    assert (stream.prompt_tokens == 20).mean() == pytest.approx(0.75, abs=0.04)
    assert "ServeGen-sampled" in stream.origin
    half = generator.sample(seed=1, start_s=600, span_s=300, share=0.5)
    assert len(half) == pytest.approx(600, rel=0.15)
    assert half.arrival_s[-1] < 300
    with pytest.raises(WorkloadError, match="not within the day"):
        generator.sample(seed=1, start_s=1000, span_s=300)


@pytest.mark.parametrize(
    "members, message",
    [
        ({"chunk_7_dataset_json": ""}, r"chunk-7-dataset\.json is missing"),
        ({"chunk_0_trace_csv": "0,1,1\n600,1,1\n"}, r"chunk-0-trace\.csv, line 1: 3 fields"),
        ({"chunk_0_trace_csv": "0,1,1,Gamma,1,1\n"}, "fewer than two windows"),
        (
            {"chunk_0_trace_csv": "0,1,1,Gamma,1,1\n600,-1,1,Gamma,1,1\n"},
            r"line 2: rate is '-1'",
        ),
        (
            {"chunk_0_trace_csv": "600,1,1,Gamma,1,1\n0,1,1,Gamma,1,1\n"},
            "line 2: start is not later",
        ),
        ({"chunk_0_trace_csv": "0,1,1,Cauchy,1,1\n600,1,1,Gamma,1,1\n"}, "law is 'Cauchy'"),
        ({"chunk_0_dataset_json": "{"}, r"chunk-0-dataset\.json: not JSON"),
        ({"chunk_0_dataset_json": '{"0": {"input_tokens": "{}"}}'}, "block 0: output_tokens is mi"),
        (
            {
                "chunk_0_dataset_json": json.dumps(
                    {"0": {"input_tokens": "print(1)", "output_tokens": "{}"}}
                )
            },
            "block 0: input_tokens is not a literal",
        ),
        (
            {
                "chunk_0_dataset_json": json.dumps(
                    {"0": {"input_tokens": "{-3: 1.0}", "output_tokens": "{}"}}
                )
            },
            "input_tokens is -3",
        ),
    ],
)
def test_servegen_archives_that_are_wrong(
    tmp_path: Path, members: dict[str, str], message: str
) -> None:
    path = archive(tmp_path / "bad.tar.gz", **members)
    with pytest.raises(WorkloadError, match=rf"bad\.tar\.gz.*{message}"):
        ServeGen(path)


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    broken = tmp_path / "broken.csv.gz"
    broken.write_bytes(b"\x1f\x8bnothing")
    with pytest.raises(WorkloadError, match="cannot be read"):
        load_workload(str(broken), seed=1)
    no_archive = tmp_path / "x.tar.gz"
    no_archive.write_text("x")
    with pytest.raises(WorkloadError, match="cannot be read"):
        load_workload(str(no_archive), seed=1)
    other = tmp_path / "trace.parquet"
    other.write_text("x")
    with pytest.raises(WorkloadError, match="not a known kind"):
        load_workload(str(other), seed=1)
    with pytest.raises(WorkloadError, match="neither a file nor one of: reasoning"):
        load_workload("nothing", seed=1)
    with pytest.raises(WorkloadError, match="needs a rate and a duration"):
        load_workload("reasoning", seed=1, rate=1.0)
    with pytest.raises(WorkloadError, match="rate is -1"):
        load_workload("reasoning", seed=1, rate=-1.0, duration_s=10)


def test_traces_at_a_rate_for_a_time(tmp_path: Path) -> None:
    """Timestamps are scaled by a constant; ServeGen's day is squeezed, or its clients thinned."""
    path = archive(tmp_path / "s.tar.gz")
    for rate, duration_s in ((0.5, 300), (8.0, 400), (50.0, 600)):
        stream = load_workload(str(path), seed=1, rate=rate, duration_s=duration_s)
        check(stream)
        assert len(stream) == pytest.approx(rate * duration_s, rel=0.15)
        assert stream.arrival_s[-1] == pytest.approx(duration_s, rel=0.1)
    csv = tmp_path / "a.csv"
    rows = "".join(f"2023-11-16 18:{i // 60:02}:{i % 60:02}.0,10,{i + 1}\n" for i in range(600))
    csv.write_text(AZURE + rows)
    stream = load_workload(str(csv), seed=1, rate=4.0, duration_s=30, start_s=100)
    assert stream.rate == pytest.approx(4.0)
    assert stream.output_tokens[0] == 101 and len(stream) == 120


def test_the_published_traces() -> None:
    """Means, spreads and rates as their description has them."""
    azure = load_azure2023(published("azure2023/AzureLLMInferenceTrace_conv.csv.gz"))
    check(azure)
    assert (len(azure), azure.output_tokens.max(), azure.prompt_tokens.max()) == (
        19366,
        1000,
        14050,
    )
    assert azure.rate == pytest.approx(5.53, abs=0.01)
    mooncake = load_mooncake(published("mooncake/conversation_trace.jsonl.gz"), seed=1)
    check(mooncake)
    assert (len(mooncake), mooncake.output_tokens.max()) == (12031, 2000)
    assert mooncake.prompt_tokens.mean() == pytest.approx(12035, abs=1)
    gaps = np.diff(mooncake.arrival_s)
    assert gaps.std() / gaps.mean() < 1.3, "bursts at the 3 s marks are gone"


def test_the_published_servegen_archive() -> None:
    generator = ServeGen(published("servegen/reason_deepseek-r1.tar.gz"))
    assert generator.rate(0, 86_400) == pytest.approx(16.0, abs=0.1)
    stream = generator.sample(seed=1, share=0.25)
    check(stream)
    outputs = stream.output_tokens
    assert len(stream) == pytest.approx(0.25 * 16.0 * 86_400, rel=0.05)
    assert outputs.mean() == pytest.approx(1527, rel=0.03)
    assert outputs.std() / outputs.mean() == pytest.approx(1.52, rel=0.05)
    assert outputs.max() == 32768
    assert abs(np.corrcoef(stream.prompt_tokens, outputs)[0, 1]) < 0.1
