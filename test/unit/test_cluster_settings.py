"""What a host that joins must have in common with the cluster."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.server_args import ServerArgs

from sglang_ares.demo_model import MODEL_DIR
from sglang_ares.engine import default_server_args
from sglang_ares.srt.managers.cluster_settings import difference, model_digest, settings_of


def settings(**given: Any) -> dict[str, str]:
    return settings_of(ServerArgs(**{**default_server_args(), **given}))


@pytest.mark.parametrize(
    "own",
    [
        {"host": "10.0.0.6", "port": 1234},
        {"max_total_tokens": 1024, "mem_fraction_static": 0.5},
        {"log_level": "debug"},
        {"base_gpu_id": 4},
        {"api_key": "one"},
    ],
)
def test_hosts_have_settings_of_their_own(own: dict[str, Any]) -> None:
    assert difference(settings(**own), settings()) is None


@pytest.mark.parametrize(
    "given,told",
    [
        ({"dtype": "bfloat16"}, "--dtype is 'bfloat16' there and 'float32' in the cluster"),
        ({"page_size": 32}, "--page-size is 32 there and 16 in the cluster"),
        ({"tp_size": 2}, "--tp-size is 2 there"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype"),
        ({"disaggregation_transfer_backend": "mooncake"}, "--disaggregation-transfer-backend"),
        ({"model_path": "Qwen/Qwen3-8B"}, "--model-path names another model"),
    ],
)
def test_a_difference_names_the_flag(given: dict[str, Any], told: str) -> None:
    differs = difference(settings(**given), settings())
    assert differs is not None and told in differs


def test_a_model_is_known_by_its_content(tmp_path: Path) -> None:
    copy = shutil.copytree(MODEL_DIR, tmp_path / "elsewhere")
    assert model_digest(str(copy)) == model_digest(str(MODEL_DIR))
    weights = next(copy.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert model_digest(str(copy)) != model_digest(str(MODEL_DIR))
    assert model_digest("Qwen/Qwen3-8B") == "id:Qwen/Qwen3-8B"


def test_no_secret_travels() -> None:
    told = settings(api_key="hush", admin_api_key="hush-hush", ssl_keyfile_password="hush")
    assert "hush" not in repr(told)


def test_versions_must_agree() -> None:
    differs = difference({**settings(), "version of sglang": "0.0.1"}, settings())
    assert differs is not None and differs.startswith("version of sglang is 0.0.1 there")
