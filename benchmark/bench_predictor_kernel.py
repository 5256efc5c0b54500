"""The length head on a GPU: the fused kernel, cuBLAS through torch, and both in a CUDA graph.

``python benchmark/bench_predictor_kernel.py [--out DIR]`` prints, for each hidden size and batch,
the relative error against float64 on fresh random states (outputs poisoned with NaN before), the
microseconds a call takes each way with weights that are not in the cache, the floor that the
measured bandwidth sets, and the overhead of the head in a captured decode step of the embedded
model. On a machine without a GPU it
checks the kernel under Triton's interpreter at small sizes, and times nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from rich.console import Console
from rich.progress import track
from rich.table import Table

from sglang_ares_kernels.measure import (
    bandwidth,
    cold_copies,
    graph_of,
    head_layers,
    relative_error,
    seconds,
    weight_bytes,
)
from sglang_ares_kernels.mlp import fused_mlp
from sglang_ares_kernels.reference import reference_mlp

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
HIDDEN = (2048, 3584, 4096, 5120, 8192)
BOUND = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def cublas(states: torch.Tensor, layers: list[Any]) -> torch.Tensor:
    """The same head as four calls of cuBLAS, which adds biases and cuts off below 0 by itself."""
    x = states
    for weight, bias in layers[:-1]:
        x = torch._addmm_activation(bias, x, weight.t())
    return functional.linear(x, *layers[-1])


def measure(d: int, batch: int, dtype: torch.dtype, bytes_per_s: float) -> dict[str, Any]:
    """One row of the table."""
    copies = cold_copies(head_layers(d, dtype, "cuda", seed=d))
    layers = copies[0]
    states = torch.randn(batch, d, device="cuda", dtype=dtype)
    out = torch.full((batch, 4), float("nan"), device="cuda")
    fused_mlp(states, layers, out=out)
    errors = [relative_error(out, reference_mlp(states, layers))]
    graph = graph_of(lambda: fused_mlp(states, layers, out=out))
    for _ in range(3):  # a graph, replayed on other states
        states.copy_(torch.randn(batch, d, device="cuda"))
        out.fill_(float("nan"))
        graph.replay()
        errors.append(relative_error(out, reference_mlp(states, layers)))
    if not max(errors) < BOUND[dtype]:
        raise AssertionError(f"d {d}, batch {batch}, {dtype}: relative error {max(errors)}")
    floor = (weight_bytes(layers) + states.numel() * states.element_size()) / bytes_per_s
    row = {"d": d, "batch": batch, "error": max(errors), "floor_us": 1e6 * floor}
    ways = {
        "kernel": lambda copy: fused_mlp(states, copy, out=out),
        "three_launches": lambda copy: fused_mlp(states, copy, out=out, launches=3),
        "cublas": lambda copy: cublas(states, copy),
    }
    for name, work in ways.items():
        row[f"{name}_graph_us"] = 1e6 * seconds(work, copies)
    for name in ("kernel", "cublas"):
        row[f"{name}_us"] = 1e6 * seconds(ways[name], copies, graph=False, repeats=5)
    row["over_floor"] = row["kernel_graph_us"] / row["floor_us"]
    row["cublas_over_kernel"] = row["cublas_graph_us"] / row["kernel_graph_us"]
    return row


def embedded_model() -> Any:
    """The embedded model, bfloat16."""
    from transformers import LlamaForCausalLM

    from sglang_ares.demo_model import MODEL_DIR

    return LlamaForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.bfloat16).cuda().eval()


def seven_billion() -> Any:
    """A Llama of the sizes of Qwen2.5-7B (its model card), with random weights: for its times."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=152064,
        tie_word_embeddings=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


class DecodeStep:
    """One decode step of a Llama in plain torch, at a context of ``CONTEXT`` tokens."""

    CONTEXT = 512

    def __init__(self, model: Any, batch: int) -> None:
        self.model = model
        self.config = config = model.config
        self.ids = torch.ones(batch, dtype=torch.long, device="cuda")
        shape = (batch, config.num_key_value_heads, self.CONTEXT, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.randn(shape, device="cuda").bfloat16() for _ in layers]
        self.values = [torch.randn(shape, device="cuda").bfloat16() for _ in layers]
        half = torch.arange(config.head_dim // 2, device="cuda") * 2 / config.head_dim
        angles = (self.CONTEXT - 1) * 10000.0 ** -torch.cat([half, half])
        self.cos, self.sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        self.layers = head_layers(config.hidden_size, torch.bfloat16, "cuda")
        self.out = torch.empty(batch, 4, device="cuda")
        self.side = torch.cuda.Stream()

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-second, first], dim=-1) * self.sin

    def _hidden(self) -> torch.Tensor:
        config, model = self.config, self.model.model
        x = model.embed_tokens.weight[self.ids]
        for layer, keys, values in zip(model.layers, self.keys, self.values, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            h = self._normed(x, layer.input_layernorm)
            q, k, v = (
                functional.linear(h, part.weight).view(len(x), -1, 1, config.head_dim)
                for part in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            keys[:, :, -1:], values[:, :, -1:] = self._rotated(k), v
            mixed = functional.scaled_dot_product_attention(
                self._rotated(q), keys, values, enable_gqa=True
            )
            x = x + functional.linear(mixed.flatten(1), attention.o_proj.weight)
            h = self._normed(x, layer.post_attention_layernorm)
            gate = functional.silu(functional.linear(h, mlp.gate_proj.weight))
            up = functional.linear(h, mlp.up_proj.weight)
            x = x + functional.linear(gate * up, mlp.down_proj.weight)
        return self._normed(x, model.norm)

    def _normed(self, x: torch.Tensor, norm: Any) -> torch.Tensor:
        return functional.rms_norm(x, norm.weight.shape, norm.weight, self.config.rms_norm_eps)

    @torch.inference_mode()
    def __call__(self, head: str) -> None:
        """``head``: ``"without"``, ``"before"`` the output layer, or ``"beside"`` it, on its own
        stream."""
        hidden = self._hidden()
        main = torch.cuda.current_stream()
        if head == "before":
            fused_mlp(hidden, self.layers, out=self.out)
        elif head == "beside":
            self.side.wait_stream(main)
            with torch.cuda.stream(self.side):
                fused_mlp(hidden, self.layers, out=self.out)
        self.model.lm_head(hidden).argmax(-1)
        if head == "beside":
            main.wait_stream(self.side)


def decode_step_overhead(model: Any, batch: int) -> dict[str, Any]:
    """What the head adds to a captured decode step."""
    step = DecodeStep(model, batch)
    # In turns, so that a change of the clock meets all three.
    found: dict[str, list[float]] = {"without": [], "before": [], "beside": []}
    for _ in range(5):
        for name, times in found.items():
            times.append(seconds(step, [name], repeats=5, calls_at_least=4))
    times = {name: statistics.median(values) for name, values in found.items()}
    return {
        "batch": batch,
        "step_us": 1e6 * times["without"],
        "with_head_us": 1e6 * times["before"],
        "head_beside_us": 1e6 * times["beside"],
        "overhead_percent": 100 * (times["before"] / times["without"] - 1),
        "beside_percent": 100 * (times["beside"] / times["without"] - 1),
    }


def show(console: Console, name: str, rows: list[dict[str, Any]]) -> None:
    """The table of one dtype."""
    table = Table(title=name)
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            *(
                f"{v:.1e}" if k == "error" else f"{v:.2f}" if isinstance(v, float) else str(v)
                for k, v in row.items()
            )
        )
    console.print(table)


def check_interpreted(console: Console) -> None:
    """Errors only, at sizes an interpreter can do."""
    for dtype, bound in BOUND.items():
        for d, batch in ((128, 1), (256, 40)):
            layers = head_layers(d, dtype, "cpu", seed=d)
            states = torch.randn(batch, d).to(dtype)
            out = torch.full((batch, 4), float("nan"))
            error = relative_error(
                fused_mlp(states, layers, out=out), reference_mlp(states, layers)
            )
            if not error < bound:
                raise AssertionError(f"d {d}, batch {batch}, {dtype}: relative error {error}")
            console.print(f"d {d}, batch {batch}, {dtype}: relative error {error:.1e} < {bound}")


def main() -> int:
    """Command line entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build"), help="folder of the figures")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--d", type=int, nargs="+", default=HIDDEN, help="hidden sizes")
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES, help="rows")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    console = Console()
    torch.manual_seed(args.seed)
    if not torch.cuda.is_available():
        check_interpreted(console)
        console.print("There is no GPU here: checked under Triton's interpreter, timed nothing.")
        return 0
    speed = bandwidth()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": str(torch.__version__),
        "command": " ".join(["python", *sys.argv]),
        "seed": args.seed,
        "bandwidth_gb_s": speed / 1e9,
    }
    console.print(f"{report['device']}: {speed / 1e9:,.0f} GB/s in a large read or copy")
    path = args.out / "predictor_kernel.json"
    args.out.mkdir(parents=True, exist_ok=True)

    def note(name: str, rows: list[dict[str, Any]]) -> None:
        report[name] = rows
        show(console, name, rows)
        path.write_text(json.dumps(report, indent=2) + "\n")

    for name in args.dtype:
        cases = [(d, b) for d in args.d for b in args.batch]
        rows = [measure(d, b, getattr(torch, name), speed) for d, b in track(cases, name)]
        note(name, rows)
    for name, make in (("embedded model", embedded_model), ("7B sizes", seven_billion)):
        model = make()
        steps = [decode_step_overhead(model, b) for b in (1, 16, 64, 256)]
        note(f"a captured decode step, {name}", steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
