"""Sampling by seed and position: the right distribution, the same token wherever it is drawn."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sglang.srt.layers import sampler
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_ares.srt.sampling.sample_seeds import SampleSeeds
from sglang_ares.srt.sampling.seeded import draw_filtered, multinomial_with_seed, uniform

MIN_INT, MAX_INT = -(2**63), 2**63 - 1


def draw(logprobs: torch.Tensor, seeds: list[int], positions: list[int]) -> torch.Tensor:
    drawn = multinomial_with_seed(logprobs, torch.tensor(seeds), torch.tensor(positions))
    assert drawn.shape == (len(seeds), 1) and drawn.dtype == torch.int64
    return drawn.view(-1)


def random_logprobs(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(2 * torch.randn(rows, columns, generator=generator), dim=-1)


# --- the uniform numbers --------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(MIN_INT, MAX_INT), st.integers(0, 2**31)), min_size=1))
def test_uniform_is_in_the_unit_interval_and_a_function(pairs: list[tuple[int, int]]) -> None:
    seeds, positions = (torch.tensor(x) for x in zip(*pairs))
    u = uniform(seeds, positions, 9)
    assert u.dtype == torch.float64 and u.shape == (len(seeds), 9)
    assert ((u > 0) & (u < 1)).all()
    assert torch.equal(u, uniform(seeds, positions, 9))


def test_uniform_is_splitmix64() -> None:
    """Against the same hash in Python's unbounded integers."""
    mask = (1 << 64) - 1
    golden = 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    for seed in (0, 1, -1, 2**62 - 1, MAX_INT, MIN_INT):
        for position in (0, 1, 17, 131072):
            state = mix((seed + golden) & mask)
            state = mix((state + (position + 1) * golden) & mask)
            columns = [mix((state + (c + 1) * golden) & mask) for c in range(3)]
            expected = [((bits >> 11) + 0.5) * 2.0**-53 for bits in columns]
            drawn = uniform(torch.tensor([seed]), torch.tensor([position]), 3)
            assert drawn[0].tolist() == expected


@pytest.mark.parametrize("along", ["positions", "seeds", "columns"])
def test_uniform_is_uniform_and_uncorrelated(along: str) -> None:
    n = 20_000
    moving, fixed = torch.arange(n), torch.full((n,), 7)
    if along == "columns":
        u = uniform(fixed[:1], fixed[:1], n)[0]
    else:
        pair = (fixed, moving) if along == "positions" else (moving, fixed)
        u = uniform(*pair, 3)[:, 1]
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    neighbours = torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]
    assert abs(neighbours.item()) < 0.03


# --- the draw -------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [2, 5, 40])
def test_distribution(columns: int) -> None:
    """Chi-square of one request's draws over many positions against its softmax."""
    n = 20_000
    row = random_logprobs(1, columns, seed=columns)
    drawn = draw(row.expand(n, -1), [1234] * n, list(range(n)))
    counts = torch.bincount(drawn, minlength=columns).double()
    expected = n * row[0].double().exp()
    common = expected >= 5
    found = [*counts[common].tolist(), counts[~common].sum().item()]
    wanted = [*expected[common].tolist(), expected[~common].sum().item()]
    if wanted[-1] < 5:
        found[-2:] = [sum(found[-2:])]
        wanted[-2:] = [sum(wanted[-2:])]
    scale = sum(found) / sum(wanted)
    assert stats.chisquare(found, [w * scale for w in wanted]).pvalue > 1e-3


def test_weights_need_not_be_normalised() -> None:
    row = random_logprobs(1, 30).expand(500, -1)
    seeds, positions = [9] * 500, list(range(500))
    assert torch.equal(draw(row, seeds, positions), draw(row - 3.0, seeds, positions))


@settings(max_examples=60)
@given(st.integers(2, 50), st.integers(0, 2**62), st.integers(0, 10**6))
def test_rounding_does_not_matter(columns: int, seed: int, position: int) -> None:
    """Differences such as another batch size makes leave the draw alone, but for near-ties."""
    logprobs = random_logprobs(1, columns, seed=seed % 10**6).double()
    noise = -torch.log(-torch.log(uniform(torch.tensor([seed]), torch.tensor([position]), columns)))
    best, second = (logprobs + noise)[0].topk(2).values.tolist()
    if best - second > 1e-4:
        rounded = logprobs + 1e-6 * random_logprobs(1, columns, seed=1).double()
        token = draw(logprobs, [seed], [position]).item()
        assert draw(rounded, [seed], [position]).item() == token


@settings(max_examples=60)
@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=8), st.integers(0, 10**6))
def test_the_batch_does_not_matter(seeds: list[int], first_position: int) -> None:
    logprobs = random_logprobs(len(seeds), 60, seed=len(seeds))
    positions = [first_position + i for i in range(len(seeds))]
    together = draw(logprobs, seeds, positions)
    alone = [
        draw(logprobs[i : i + 1], [seeds[i]], [positions[i]]).item() for i in range(len(seeds))
    ]
    assert together.tolist() == alone


def test_seed_and_position_matter() -> None:
    row = random_logprobs(1, 100).expand(64, -1)
    assert len(set(draw(row, [5] * 64, list(range(64))).tolist())) > 10
    assert len(set(draw(row, list(range(64)), [5] * 64).tolist())) > 10


@settings(max_examples=60)
@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(0, 2**62))
def test_the_impossible_is_never_drawn(possible: list[bool], seed: int) -> None:
    if not any(possible):
        possible[0] = True
    logprobs = random_logprobs(1, len(possible)).masked_fill(~torch.tensor(possible), float("-inf"))
    positions = list(range(200))
    drawn = draw(logprobs.expand(200, -1), [seed] * 200, positions)
    assert all(possible[i] for i in drawn.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_of_the_logprobs_is_kept(dtype: torch.dtype) -> None:
    logprobs = random_logprobs(16, 1000).to(dtype)
    drawn = draw(logprobs, [3] * 16, list(range(16)))
    assert torch.equal(drawn, draw(logprobs.double(), [3] * 16, list(range(16))))


# --- with upstream's sampler ----------------------------------------------------------------


def sample(
    probs: torch.Tensor,
    *,
    top_k: int,
    top_p: float,
    min_p: list[float],
    seeds: list[int],
    positions: list[int],
    **extra: Any,
) -> Any:
    """Upstream's sampler with both of our hooks, as in a worker."""
    n = len(probs)
    return draw_filtered(
        sampler.top_k_top_p_min_p_sampling_from_probs_torch,
        probs.clone(),
        torch.full((n,), top_k),
        torch.full((n,), top_p),
        torch.tensor(min_p),
        any(p > 0 for p in min_p),
        torch.tensor(seeds),
        torch.tensor(positions),
        **extra,
    )


@pytest.fixture(autouse=True)
def seeded_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "multinomial_with_seed", multinomial_with_seed)


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.3, 1.0])
def test_min_p_keeps_exactly_its_set(min_p: float) -> None:
    n = 3000
    row = random_logprobs(1, 12, seed=4).exp()
    drawn = sample(
        row.expand(n, -1), top_k=1 << 30, top_p=1.0, min_p=[min_p] * n,
        seeds=[6] * n, positions=list(range(n)),
    )  # fmt: skip
    allowed = {i for i, p in enumerate(row[0].tolist()) if p >= min_p * row.max().item()}
    seen = set(drawn.tolist())
    assert seen <= allowed
    likely = {i for i in allowed if row[0, i] > 0.01}
    assert likely <= seen


def test_min_p_is_that_of_each_row() -> None:
    n = 400
    row = random_logprobs(1, 12, seed=4).exp()
    drawn = sample(
        row.expand(n, -1), top_k=1 << 30, top_p=1.0, min_p=[1.0, 0.0] * (n // 2),
        seeds=[6] * n, positions=list(range(n)),
    )  # fmt: skip
    assert set(drawn[::2].tolist()) == {row.argmax().item()}
    assert len(set(drawn[1::2].tolist())) > 3


@settings(max_examples=60)
@given(st.integers(1, 12), st.floats(0.05, 1.0), st.floats(0.0, 1.0), st.integers(0, 1000))
def test_all_three_filters_keep_upstreams_set(
    top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    """The very weights that upstream keeps without seeds, where it allows min-p."""
    row = random_logprobs(1, 12, seed=seed).exp()
    _, upstreams, order, _ = sampler.top_k_top_p_min_p_sampling_from_probs_torch(
        row.clone(),
        torch.tensor([top_k]),
        torch.tensor([top_p]),
        torch.tensor([min_p]),
        True,
        None,
        torch.tensor([0]),
        return_filtered_probs=True,
    )
    kept = {int(i) for i, p in zip(order[0], upstreams[0]) if p > 0}
    n = 400
    drawn = sample(
        row.expand(n, -1), top_k=top_k, top_p=top_p, min_p=[min_p] * n, seeds=[seed] * n,
        positions=list(range(n)),
    )  # fmt: skip
    weights = {int(i): float(p) for i, p in zip(order[0], upstreams[0]) if p > 0}
    assert set(drawn.tolist()) <= kept
    likely = {i for i, p in weights.items() if p / sum(weights.values()) > 0.05}
    assert likely <= set(drawn.tolist())


@pytest.mark.parametrize("neighbours_min_p", [0.0, 0.4])
def test_a_row_is_drawn_alike_with_and_without_filtered_neighbours(
    neighbours_min_p: float,
) -> None:
    """Upstream sorts the columns only when some row of the batch asks for a filter."""
    for position in range(50):
        row = random_logprobs(1, 50, seed=2)
        unfiltered = draw(row, [11], [position]).item()
        filtered = sample(
            torch.cat([row.exp(), random_logprobs(1, 50, seed=9).exp()]),
            top_k=1 << 30,
            top_p=1.0,
            min_p=[0.0, neighbours_min_p],
            seeds=[11, 12],
            positions=[position, 8],
        )
        assert filtered[0].item() == unfiltered


def test_without_seeds_upstream_is_called_as_it_was() -> None:
    calls: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def original(probs: torch.Tensor, **kwargs: Any) -> str:
        calls.append((probs, kwargs))
        return "result"

    probs = torch.rand(2, 4)
    arguments = {
        "top_ks": 1,
        "top_ps": 2,
        "min_ps": torch.tensor([0.5, 0.5]),
        "need_min_p_sampling": True,
        "sampling_seed": None,
        "positions": 3,
    }
    assert draw_filtered(original, probs, **arguments, return_filtered_probs=True) == "result"
    ((seen, kwargs),) = calls
    assert seen is probs
    assert kwargs.pop("return_filtered_probs") is True
    assert kwargs == arguments


def test_return_filtered_probs_passes_through() -> None:
    row = random_logprobs(1, 12).exp()
    tokens, kept, order, weight = sample(
        row, top_k=5, top_p=0.9, min_p=[0.1], seeds=[1], positions=[2], return_filtered_probs=True
    )
    assert kept[0, (order[0] == tokens[0]).nonzero()].item() == weight.item()


def test_the_caller_keeps_its_probabilities() -> None:
    """Filtering must not write into what upstream computes log-probabilities from."""
    probs = random_logprobs(1, 12).exp()
    before = probs.clone()
    for extra in ({}, {"return_filtered_probs": True}):
        draw_filtered(
            lambda p, **kwargs: None,
            probs,
            torch.tensor([5]),
            torch.tensor([0.9]),
            torch.tensor([0.9]),
            True,
            torch.tensor([1]),
            torch.tensor([1]),
            **extra,
        )
    assert torch.equal(probs, before)


# --- seeds of requests ----------------------------------------------------------------------


def request_with(**params: Any) -> Any:
    return SimpleNamespace(sampling_params=SamplingParams(**params), input_ids=array("q", [1, 2]))


def test_the_clients_seed_is_kept_and_others_are_random() -> None:
    seeds = SampleSeeds()
    assert seeds.seed_for(request_with(sampling_seed=7)) == 7
    assert seeds.seed_for(request_with(sampling_seed=7)) == 7
    drawn = {seeds.seed_for(request_with()) for _ in range(50)}
    assert len(drawn) == 50 and all(0 <= seed < 2**62 for seed in drawn)


def test_samples_of_one_request_get_seeds_of_their_own_again_and_again() -> None:
    seeds = SampleSeeds()
    first, again = (
        [seeds.seed_for(request_with(sampling_seed=7, n=4)) for _ in range(4)] for _ in range(2)
    )
    assert first[0] == 7 and len(set(first)) == 4
    assert again == first
    assert all(0 <= seed < 2**62 for seed in first)


def test_samples_of_any_length_get_seeds_of_their_own() -> None:
    seeds = SampleSeeds()
    drawn = [
        seeds.seed_for(request_with(sampling_seed=7, n=3, max_new_tokens=None)) for _ in range(3)
    ]
    assert drawn[0] == 7 and len(set(drawn)) == 3


def test_the_prompt_sent_ahead_is_not_a_sample() -> None:
    seeds = SampleSeeds()
    assert seeds.seed_for(request_with(sampling_seed=7, n=2, max_new_tokens=0)) == 7
    assert seeds.seed_for(request_with(sampling_seed=7, n=2)) == 7
    assert seeds.seed_for(request_with(sampling_seed=7, n=2)) != 7
