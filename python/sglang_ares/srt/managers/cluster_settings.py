"""What every worker of a cluster must have in common, so that a request can run on any of them.

A host that wants to join sends these settings; where they differ from the cluster's it is refused
with the flags. Settings that concern one host only (addresses, logs, memory) are left out, and
so is anything secret.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

import sglang_ares

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

_MODEL_PATHS: Final = ("model_path", "tokenizer_path")
# Fields of upstream's server arguments that each host may set for itself.
HOSTS_OWN: Final = frozenset({
    "host", "port", "base_gpu_id", "gpu_id_step", "nccl_port", "dist_init_addr", "download_dir",
    "served_model_name", "mem_fraction_static", "max_total_tokens", "chat_template",
    "tool_call_parser", "fastapi_root_path", "watchdog_timeout", "soft_watchdog_timeout",
    "disaggregation_mode", "disaggregation_bootstrap_port", "disaggregation_ib_device",
    "model_loader_extra_config", "weight_loader_prefetch_checkpoints", "numa_node", "random_seed",
})  # fmt: skip
_HOSTS_OWN_PREFIXES: Final = (
    "log_", "ssl_", "metrics", "enable_metrics", "crash_dump", "show_", "collect_", "bucket_",
    "prompt_tokens_buckets", "generation_tokens_buckets", "tokenizer_metrics", "decode_log",
    "enable_trace", "otlp_", "trace", "kv_events", "enable_request_time", "export_metrics",
)  # fmt: skip
_SECRET: Final = ("api_key", "password", "secret", "_key_")
_LONGEST: Final = 200
# Of each weight file the two ends are read: enough to tell models apart, and quick.
_SAMPLE_BYTES: Final = 1 << 20
_MODEL_FILES: Final = ("*.json", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.model")


def settings_of(server_args: ServerArgs) -> dict[str, str]:
    """Name and value of every setting that is not upstream's default, the model's digest, and
    the versions of the software."""
    settings = {
        "version of sglang": importlib.metadata.version("sglang"),
        "version of sglang-ares": sglang_ares.__version__,
    }
    for field in msgspec.structs.fields(type(server_args)):
        value = getattr(server_args, field.name)
        if field.name in _MODEL_PATHS:
            settings[_flag(field.name)] = model_digest(value) if value else ""
        elif not _is_hosts_own(field.name) and value != _default(field):
            text = repr(value)
            if len(text) > _LONGEST:
                text = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
            settings[_flag(field.name)] = text
    return settings


def difference(theirs: dict[str, str], ours: dict[str, str]) -> str | None:
    """How the settings of a host that wants to join differ from the cluster's."""
    parts = []
    for name in sorted(theirs.keys() | ours.keys()):
        there, here = theirs.get(name, "the default"), ours.get(name, "the default")
        if there == here:
            continue
        if name in map(_flag, _MODEL_PATHS):
            parts.append(f"{name} names another model (its files or its name differ)")
        else:
            parts.append(f"{name} is {there} there and {here} in the cluster")
    return "; ".join(parts) or None


def model_digest(path: str) -> str:
    """A model folder by its content, wherever it lies; a model id by its name."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return f"id:{path}"
    digest = hashlib.sha256()
    for file in sorted({f for pattern in _MODEL_FILES for f in folder.glob(pattern)}):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(_SAMPLE_BYTES))
            opened.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(opened.read(_SAMPLE_BYTES))
    return f"sha256:{digest.hexdigest()}"


def _is_hosts_own(name: str) -> bool:
    return (
        name in HOSTS_OWN
        or name.startswith(_HOSTS_OWN_PREFIXES)
        or any(part in f"{name}_" for part in _SECRET)
    )


def _default(field: msgspec.structs.FieldInfo) -> object:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return field.default


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
