"""The kernel against its reference in float64: on a GPU, or under Triton's interpreter.

Triton reads ``TRITON_INTERPRET`` when it is imported, so on a CPU these tests run in a process of
their own, started by the first of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch

from sglang_ares.srt.predictor.head import layer_sizes

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS_HERE = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
if RUNS_HERE:
    from sglang_ares_kernels.mlp import MAX_ROWS, fused_mlp
    from sglang_ares_kernels.reference import reference_mlp
    from sglang_ares_kernels.tuning import Tiles
here = pytest.mark.skipif(not RUNS_HERE, reason="runs in the process of the first test")


@pytest.mark.skipif(RUNS_HERE, reason="needs no process of its own")
def test_all_of_these_under_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "39 passed" in done.stdout, done.stdout[-300:]


BOUND = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def random_head(sizes: tuple[int, ...], dtype: torch.dtype, seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    return [
        (
            (torch.randn(o, i, generator=g) * (2 / i) ** 0.5).to(DEVICE, dtype),
            (0.1 * torch.randn(o, generator=g)).to(DEVICE, dtype),
        )
        for i, o in pairwise(sizes)
    ]


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@here
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("d,rows", [(16, 1), (128, 33), (272, 70)])
def test_equals_the_reference(d: int, rows: int, dtype: torch.dtype) -> None:
    layers = random_head(layer_sizes(d, "quantile"), dtype, seed=d + rows)
    states = torch.randn(rows, d, generator=torch.Generator().manual_seed(rows)).to(DEVICE, dtype)
    out = torch.full((rows, 4), float("nan"), device=DEVICE)
    assert fused_mlp(states, layers, out=out) is out
    assert relative_error(out, reference_mlp(states, layers)) < BOUND[dtype]


@here
def test_the_papers_sizes_and_one_output() -> None:
    sizes = layer_sizes(3584, "l1")
    assert sizes == (3584, 2048, 512, 64, 1)
    layers = random_head(sizes, torch.bfloat16, seed=1)
    states = torch.randn(2, 3584).to(DEVICE, torch.bfloat16)
    # Under the interpreter few large tiles are fast, on a GPU the tuned ones.
    tiles = Tiles(16, 512, 512, 2, True, 16, 256, 512, 2, 256, 4, 1, 1) if DEVICE == "cpu" else None
    found = fused_mlp(states, layers, tiles)
    assert relative_error(found, reference_mlp(states, layers)) < 1e-2


@here
def test_replays_like_a_graph_does() -> None:
    """The counters are back at zero after every launch, whatever the batch."""
    layers = random_head(layer_sizes(64, "quantile"), torch.float32, seed=2)
    for rows in (1, 40, 17, 40, 2):
        states = torch.randn(rows, 64, device=DEVICE)
        out = torch.full((rows, 4), float("nan"), device=DEVICE)
        fused_mlp(states, layers, out=out)
        assert relative_error(out, reference_mlp(states, layers)) < 1e-5


@here
def test_more_rows_than_a_launch_takes() -> None:
    layers = random_head(layer_sizes(16, "quantile"), torch.float32, seed=3)
    states = torch.randn(MAX_ROWS + 9, 16, device=DEVICE)
    assert relative_error(fused_mlp(states, layers), reference_mlp(states, layers)) < 1e-5


@here
def test_a_row_with_nan_stays_alone() -> None:
    layers = random_head(layer_sizes(64, "quantile"), torch.float32, seed=4)
    states = torch.randn(5, 64, device=DEVICE)
    states[2, 7] = float("nan")
    out = fused_mlp(states, layers)
    assert out[2].isnan().all()
    assert torch.isfinite(out[[0, 1, 3, 4]]).all()


@here
def test_rows_of_a_wider_tensor() -> None:
    layers = random_head(layer_sizes(64, "quantile"), torch.float32, seed=5)
    wide = torch.randn(6, 128, device=DEVICE)
    assert (
        relative_error(fused_mlp(wide[:, :64], layers), reference_mlp(wide[:, :64], layers)) < 1e-5
    )


@here
def test_a_hidden_size_that_does_not_fit_is_refused() -> None:
    layers = random_head(layer_sizes(64, "quantile"), torch.float32, seed=6)
    with pytest.raises(ValueError, match="multiple of 16"):
        fused_mlp(torch.randn(2, 72, device=DEVICE), layers)


@pytest.mark.skipif(RUNS_HERE and DEVICE == "cpu", reason="interpreted code is not compiled")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [16, 64, 512])
@pytest.mark.parametrize("device,capability,kib", [(None, 90, 227), ("small", 89, 99)])
def test_compiles_without_a_gpu(
    device: str | None, capability: int, kib: int, rows: int, dtype: torch.dtype
) -> None:
    """What an interpreter lets pass and a compiler does not; the tiles fit a multiprocessor."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sglang_ares_kernels import mlp
    from sglang_ares_kernels.tuning import DEFAULT_DEVICE, _find

    name = device or DEFAULT_DEVICE
    tiles = mlp._with_room(_find(name, name, str(dtype).removeprefix("torch."), 3584, rows), rows)
    constants = mlp.constants(layer_sizes(3584, "quantile"), tiles, dtype)
    kinds = {"rows": "i32", "skipped": "i32", "stride_x": "i32", "counters": "*i32"}
    kinds |= dict.fromkeys(("h1", "h2", "out"), "*fp32")
    given = "*bf16" if dtype == torch.bfloat16 else "*fp32"
    names = mlp._mlp.arg_names
    signature = {n: "constexpr" if n in constants else kinds.get(n, given) for n in names}
    source = ASTSource(
        fn=mlp._mlp,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if "*" in signature[n]},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": tiles.warps})
    assert compiled.metadata.shared <= kib << 10
    assert "cubin" in compiled.asm


@pytest.mark.parametrize("rows", [65, 257, 512])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_the_parts_of_a_large_batch_have_room(rows: int, dtype: torch.dtype) -> None:
    from sglang_ares_kernels import mlp
    from sglang_ares_kernels.tuning import tiles_for

    for d in (128, 2048, 3584, 4096, 5120, 8192):
        tiles = mlp._with_room(tiles_for(d, rows, dtype, torch.device("cpu")), rows)
        sizes = layer_sizes(d, "quantile")
        found = mlp.constants(sizes, tiles, dtype)
        parts = max(-(-sizes[0] // found["KS1"]), -(-sizes[1] // found["KS2"]))
        assert rows * parts <= mlp._ROOM


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 512])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_every_batch_has_tiles(rows: int, dtype: torch.dtype) -> None:
    from sglang_ares_kernels.tuning import tiles_for

    assert tiles_for(3584, rows, dtype, torch.device("cpu")).rows1 >= 16
