"""What cannot run in, or move within, a cluster: one table each, one reason a row.

``CLUSTER`` is checked once, at start, on the resolved server arguments. ``REQUEST`` is checked
before a request moves; a request that cannot move is served like any other and stays where
placement put it. ``TRAVEL`` is checked before a request is given to a worker on another host,
``ROLE_CHANGE`` before a worker changes its role. All tables are printed into the documentation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sglang.srt.environ import envs


@dataclass(frozen=True)
class Refusal:
    """One row: ``key`` is short and stable (metrics, logs), ``applies`` decides."""

    key: str
    what: str
    reason: str
    remedy: str
    applies: Callable[[Any], bool]


CLUSTER: tuple[Refusal, ...] = (
    Refusal(
        "disaggregation_mode",
        "--disaggregation-mode",
        "ARES starts the prefill and decode workers itself.",
        "Drop it; set --ares-prefill-workers and --ares-decode-workers.",
        lambda a: a.disaggregation_mode != "null",
    ),
    Refusal(
        "pipeline_parallel",
        "--pp-size > 1",
        "A request's KV is spread over stages that step at different times.",
        "Use more decode workers: --ares-decode-workers.",
        lambda a: a.pp_size > 1,
    ),
    Refusal(
        "data_parallel",
        "--dp-size > 1, --enable-dp-attention",
        "Ranks of one worker would own different requests.",
        "Use more decode workers: --ares-decode-workers.",
        lambda a: a.dp_size > 1 or a.enable_dp_attention,
    ),
    Refusal(
        "multi_node",
        "--nnodes > 1",
        "A worker that spans hosts cannot be started by this launcher yet.",
        "Run every worker on one host.",
        lambda a: a.nnodes > 1,
    ),
    Refusal(
        "speculative",
        "--speculative-algorithm",
        "The draft model's state does not move yet.",
        "Drop the speculative flags.",
        lambda a: a.speculative_algorithm is not None,
    ),
    Refusal(
        "hierarchical_cache",
        "--enable-hierarchical-cache, --enable-hisparse, --enable-lmcache",
        "KV that lives on the host or in storage does not move yet.",
        "Drop the flag.",
        lambda a: a.enable_hierarchical_cache or a.enable_hisparse or a.enable_lmcache,
    ),
    Refusal(
        "lora_overlap_loading",
        "--enable-lora-overlap-loading",
        "Adapters are then loaded as requests are queued, which one that moves is not.",
        "Drop the flag; adapters are loaded with the first batch that needs them.",
        lambda a: bool(a.enable_lora_overlap_loading),
    ),
    Refusal(
        "role_switch",
        "--enable-pd-role-switch",
        "ARES empties a worker before it changes its role.",
        "Drop it; POST /ares/role changes roles without it.",
        lambda a: a.enable_pd_role_switch,
    ),
    Refusal(
        "embedding",
        "--is-embedding",
        "Embedding requests do not decode.",
        "Serve embedding models with sglang.launch_server.",
        lambda a: a.is_embedding,
    ),
    Refusal(
        "skip_tokenizer_init",
        "--skip-tokenizer-init",
        "The order of a moved request's tokens is restored in the detokenizer.",
        "Drop the flag; /generate accepts and returns token ids with it or without.",
        lambda a: a.skip_tokenizer_init,
    ),
    Refusal(
        "tokenizer_workers",
        "--tokenizer-worker-num > 1",
        "The cluster's endpoints live in one front process.",
        "Drop the flag.",
        lambda a: a.tokenizer_worker_num > 1,
    ),
    Refusal(
        "other_front",
        "--grpc-mode, --smg-grpc-mode, --use-ray, --encoder-only, --enable-pdmux",
        "These replace the front or the scheduler that ARES extends.",
        "Drop the flag.",
        lambda a: a.grpc_mode or a.smg_grpc_mode or a.use_ray or a.encoder_only or a.enable_pdmux,
    ),
)

# Checked when a role is to change; the cluster serves all the same, with fixed roles.
ROLE_CHANGE: tuple[Refusal, ...] = (
    Refusal(
        "expert_parallel",
        "--ep-size > 1, --moe-a2a-backend",
        "Prefill and decode use other all-to-all kernels, chosen at start.",
        "Drop the flag.",
        lambda a: a.ep_size > 1 or a.moe_a2a_backend != "none",
    ),
    Refusal(
        "context_parallel",
        "--dcp-size > 1, --attn-cp-size > 1",
        "The layout of the KV cache depends on the role.",
        "Drop the flag.",
        lambda a: a.dcp_size > 1 or a.attn_cp_size > 1,
    ),
    Refusal(
        "host_memory",
        "--disaggregation-decode-host-receive-threshold, "
        "--disaggregation-decode-enable-offload-kvcache",
        "A worker that was started for prefill has no host pool to decode with.",
        "Drop the flag.",
        lambda a: (
            a.disaggregation_decode_host_receive_threshold > 0
            or a.disaggregation_decode_enable_offload_kvcache
        ),
    ),
    Refusal(
        "staging",
        "SGLANG_DISAGG_STAGING_BUFFER",
        "Its buffers are registered for one role.",
        "Unset it.",
        lambda a: bool(envs.SGLANG_DISAGG_STAGING_BUFFER.get()),
    ),
)

MODEL: tuple[Refusal, ...] = (
    Refusal(
        "hybrid_state",
        "hybrid, Mamba and sliding-window models",
        "State outside the paged KV cache does not move yet.",
        "Serve the model with sglang.launch_server.",
        lambda scheduler: scheduler.is_hybrid_ssm or scheduler.is_hybrid_swa,
    ),
    Refusal(
        "multimodal",
        "multimodal models",
        "Image and audio inputs do not move yet.",
        "Serve the model with sglang.launch_server.",
        lambda scheduler: scheduler.model_config.is_multimodal,
    ),
)

REQUEST: tuple[Refusal, ...] = (
    Refusal(
        "session",
        "session requests",
        "The session's history lives on one worker.",
        "The request stays where it is.",
        lambda r: r.session_params is not None or r.session_id is not None,
    ),
    Refusal(
        "multimodal",
        "multimodal inputs",
        "Image and audio features do not move yet.",
        "The request stays where it is.",
        lambda r: r.mm_inputs is not None,
    ),
    Refusal(
        "embeddings_input",
        "input embeddings and overrides",
        "Embedding tensors are not part of the message.",
        "The request stays where it is.",
        lambda r: r.input_embeds is not None or r.positional_embed_overrides is not None,
    ),
    Refusal(
        "beam_search",
        "beam search",
        "Its rows share KV and end together.",
        "The request stays where it is.",
        lambda r: (r.sampling_params.beam_width or 1) > 1,
    ),
    Refusal(
        "custom_logit_processor",
        "custom logit processors",
        "They may keep state of their own.",
        "The request stays where it is.",
        lambda r: r.custom_logit_processor is not None,
    ),
    Refusal(
        "captured_tensors",
        "return_hidden_states, return_routed_experts, return_indexer_topk, return_sampling_mask",
        "Tensors captured so far are not part of the message.",
        "The request stays where it is.",
        lambda r: bool(
            r.return_hidden_states
            or r.return_routed_experts
            or r.return_indexer_topk
            or r.return_sampling_mask
        ),
    ),
)

_STAYS_HERE = "It is served by the workers of the front's host."
TRAVEL: tuple[Refusal, ...] = (
    *(replace(row, remedy=_STAYS_HERE) for row in REQUEST),
    Refusal(
        "flat_logprobs",
        "return_flat_raw_top_logprobs",
        "Arrays are not part of the message that carries outputs.",
        _STAYS_HERE,
        lambda r: r.return_flat_raw_top_logprobs,
    ),
)


def first_refusal(table: tuple[Refusal, ...], subject: Any) -> Refusal | None:
    """The first row that applies to ``subject``, or None."""
    return next((row for row in table if row.applies(subject)), None)
