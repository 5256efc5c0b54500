"""What upstream's server arguments become under ``--ares-emulate``."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from sglang_ares.ares_args import AresArgs, AresArgsError
from sglang_ares.profiles.profile import Profile, ProfileError, load_profile

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

logger = logging.getLogger(__name__)

# The demo model shrunk to 128 bytes of KV per token, so that real capacities fit into memory.
_SMALLEST = {
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "hidden_size": 16,
    "intermediate_size": 16,
    "max_position_embeddings": 131_072,
}


def profile_of(ares_args: AresArgs) -> Profile | None:
    """The profile that the workers emulate, if they do. Raises :class:`AresArgsError`."""
    if not ares_args.emulate:
        if ares_args.time_dilation != 1:
            raise AresArgsError(
                "--ares-time-dilation changes emulated times only; add --ares-emulate PROFILE or "
                "drop it."
            )
        return None
    try:
        return load_profile(ares_args.emulate)
    except ProfileError as error:
        raise AresArgsError(f"--ares-emulate: {error}") from None


def emulated_server_args(profile: Profile) -> dict[str, Any]:
    """Upstream's server arguments as the profile has them; the operator's win over them."""
    return {
        "load_format": "dummy",
        "json_model_override_args": json.dumps(_SMALLEST),
        "max_total_tokens": profile.kv_capacity_tokens,
        "max_running_requests": profile.max_running,
        "chunked_prefill_size": profile.chunked_prefill_tokens,
        "max_prefill_tokens": profile.chunked_prefill_tokens,
    }


def not_emulated(req: TokenizedGenerateReqInput) -> str | None:
    """What a request asks for that only a model has, if anything."""
    params = req.sampling_params
    if req.return_logprob:
        return "log-probabilities"
    if req.return_hidden_states:
        return "hidden states"
    if any((params.json_schema, params.regex, params.ebnf, params.structural_tag)):
        return "answers that follow a grammar"
    return None


def announce(profile: Profile, dilation: float) -> None:
    """Say that nothing here comes from a model."""
    logger.warning(
        "EMULATED: no model runs. Step times are those of profile %r (%s on %s), times %g; "
        "the tokens mean nothing.",
        profile.name,
        profile.model,
        profile.hardware,
        dilation,
    )
