"""The ``--ares-*`` flags, the refusal tables and the errors an operator sees at start."""

from __future__ import annotations

import argparse
import dataclasses
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.server_args import ServerArgs

from sglang_ares import launch_server
from sglang_ares.ares_args import AresArgs, AresArgsError, flag_name
from sglang_ares.demo_model import MODEL_DIR
from sglang_ares.engine import ares_args_of, control_plane_of, prepare_server_args
from sglang_ares.launch_server import build_parser, check_port, parse_args
from sglang_ares.srt.disaggregation.refusals import (
    CLUSTER,
    MODEL,
    REQUEST,
    Refusal,
    first_refusal,
)
from sglang_ares.srt.policy.registry import PLACEMENT, RESCHEDULING

FIELDS = dataclasses.fields(AresArgs)


def parsed(*argv: str) -> AresArgs:
    parser = argparse.ArgumentParser()
    AresArgs.add_cli_args(parser)
    return AresArgs.from_namespace(parser.parse_args(argv))


# --- flags ----------------------------------------------------------------------------------


def test_defaults_on_the_command_line_are_those_of_the_class() -> None:
    assert parsed() == AresArgs()


OTHER_VALUES: dict[str, Any] = {
    "profile_cache": "off",
    "profile_at_start": "off",
    "placement": "round_robin",
    "rescheduling": "none",
    "migration_memory_share": 0.25,
    "migration_copy": "stopped",
    "decode_radix_cache": "off",
    "memory_floor": 0.2,
    "control_host": "0.0.0.0",
    "curve_keys": "keys",
    "emulate": "profile.json",
    "role_emptying": "wait",
    "emulate_predictions": "noisy",
    "predictor": "heads/mine",
    "predictor_record": "states",
}


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f.name)
def test_every_field_is_a_flag(field: dataclasses.Field[Any]) -> None:
    if field.name == "roles":
        slos = ("--ares-ttft-slo-ms", "1000", "--ares-tpot-slo-ms", "50")
        assert parsed("--ares-roles", "arrow", *slos).roles == "arrow"
        return
    if field.name == "admission":
        slo = ("--ares-ttft-slo-ms", "1000")
        assert parsed("--ares-admission", "slo", *slo).admission == "slo"
        return
    value = OTHER_VALUES.get(field.name)
    if isinstance(field.default, bool):
        name = flag_name(field.name)
        for default in (True, False):
            given = parsed(name if default else name.replace("--", "--no-", 1))
            assert given == dataclasses.replace(AresArgs(), **{field.name: default})
        return
    if value is None:
        is_switch = isinstance(field.default, bool)
        value = not field.default if is_switch else type(field.default)(field.default + 3)
    assert value != field.default
    args = parsed(flag_name(field.name), *([] if value is True else [str(value)]))
    assert getattr(args, field.name) == value
    assert args == dataclasses.replace(AresArgs(), **{field.name: value})


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f.name)
def test_every_flag_is_explained(field: dataclasses.Field[Any]) -> None:
    parser = argparse.ArgumentParser(prog="x")
    AresArgs.add_cli_args(parser)
    text = " ".join(parser.format_help().split())
    assert flag_name(field.name) in text
    assert f"Default: {field.default}." in text
    assert len(field.metadata["help"]) > 15


@pytest.mark.parametrize("given", [{}, {"ttft_slo_ms": 1000.0}, {"tpot_slo_ms": 50.0}])
def test_planners_of_roles_need_both_slos(given: dict[str, float]) -> None:
    with pytest.raises(AresArgsError, match="--ares-ttft-slo-ms and --ares-tpot-slo-ms"):
        AresArgs(roles="ares", **given)  # type: ignore[arg-type]


def test_admission_by_slo_needs_one_and_fixed_roles() -> None:
    with pytest.raises(AresArgsError, match="set --ares-ttft-slo-ms"):
        AresArgs(admission="slo")
    with pytest.raises(AresArgsError, match="leave one of them out"):
        AresArgs(admission="slo", roles="ares", ttft_slo_ms=1000.0, tpot_slo_ms=50.0)
    with pytest.raises(AresArgsError, match="choose one of: worker, slo"):
        AresArgs(admission="nobodys")


def test_flag_names() -> None:
    assert flag_name("decode_workers") == "--ares-decode-workers"


def test_the_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        AresArgs().decode_workers = 4  # type: ignore[misc]


def test_total_workers() -> None:
    assert AresArgs(prefill_workers=2, decode_workers=5).total_workers == 7


def test_choices_come_from_the_registries() -> None:
    metadata = {f.name: f.metadata for f in FIELDS}
    assert metadata["placement"]["choices"] == PLACEMENT.names()
    assert metadata["rescheduling"]["choices"] == RESCHEDULING.served_names()


@pytest.mark.parametrize(
    "name,value,remedy",
    [
        ("prefill_workers", 0, "at least 1"),
        ("decode_workers", 0, "at least one worker of each role"),
        ("decode_workers", -2, "at least 1"),
        ("max_moves", -1, "at least 0"),
        ("max_migrations_per_worker", 0, "at least 1"),
        ("min_gap_tokens", -1, "at least 0"),
        ("reschedule_interval", 0.0, "above 0 seconds"),
        ("report_interval", -1.0, "above 0 seconds"),
        ("migration_timeout", 0.0, "above 0 seconds"),
        ("migration_timeout", float("nan"), "above 0 seconds"),
        ("worker_start_timeout", 0.0, "above 0 seconds"),
        ("reschedule_threshold", -0.1, "must not be negative"),
        ("reschedule_threshold", float("nan"), "must"),
        ("move_cooldown", -1.0, "must not be negative"),
        ("move_cooldown", float("nan"), "must"),
        ("migration_bandwidth", -1.0, "must not be negative"),
        ("migration_chunk_tokens", 0, "at least 1"),
        ("migration_memory_share", 0.0, "above 0 and at most 1"),
        ("migration_memory_share", 1.1, "above 0 and at most 1"),
        ("migration_memory_share", float("nan"), "above 0 and at most 1"),
        ("migration_copy", "later", "choose one of: live, stopped"),
        ("decode_radix_cache", "maybe", "choose one of: on, off"),
        ("memory_floor", -0.1, "from 0 to below 1"),
        ("memory_floor", 1.0, "from 0 to below 1"),
        ("memory_floor", float("nan"), "from 0 to below 1"),
        ("placement", "best", "choose one of: "),
        ("rescheduling", "best", "choose one of: "),
    ],
)
def test_an_error_names_the_flag_and_the_remedy(name: str, value: Any, remedy: str) -> None:
    with pytest.raises(AresArgsError) as caught:
        AresArgs(**{name: value})
    text = str(caught.value)
    assert flag_name(name) in text and remedy in text and str(value) in text


@pytest.mark.parametrize(
    "name", ["max_moves", "min_gap_tokens", "reschedule_threshold", "move_cooldown"]
)
def test_zero_is_allowed_where_it_means_something(name: str) -> None:
    assert getattr(AresArgs(**{name: type(getattr(AresArgs(), name))(0)}), name) == 0


def test_an_unknown_choice_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--ares-placement", "best")
    assert "least_tokens" in capsys.readouterr().err


# --- keyword arguments ----------------------------------------------------------------------


def test_pop_from_kwargs_takes_only_its_own() -> None:
    kwargs = {"ares_decode_workers": 4, "model_path": "m", "ares_move_cooldown": 0.5}
    args = AresArgs.pop_from_kwargs(kwargs)
    assert args == AresArgs(decode_workers=4, move_cooldown=0.5)
    assert kwargs == {"model_path": "m"}


def test_pop_from_kwargs_without_any() -> None:
    assert AresArgs.pop_from_kwargs({"tp_size": 2}) == AresArgs()


def test_an_unknown_keyword_names_itself_and_the_known_ones() -> None:
    with pytest.raises(AresArgsError) as caught:
        AresArgs.pop_from_kwargs({"ares_decode_worker": 4})
    assert "'ares_decode_worker'" in str(caught.value)
    assert "ares_decode_workers" in str(caught.value)


def test_keyword_values_are_checked_too() -> None:
    with pytest.raises(AresArgsError, match="--ares-decode-workers is 0"):
        AresArgs.pop_from_kwargs({"ares_decode_workers": 0})


# --- the parser -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return build_parser()


def test_help_has_an_ares_group_first(parser: argparse.ArgumentParser) -> None:
    text = parser.format_help()
    assert "\nARES:" in text
    assert text.index("--ares-decode-workers N" if "--ares-decode-workers N" in text else
                      "--ares-decode-workers") < text.index("--model-path MODEL_PATH")  # fmt: skip
    (group,) = [g for g in parser._action_groups if g.title == "ARES"]
    assert {a.dest for a in group._group_actions} == {f"ares_{f.name}" for f in FIELDS}


def test_the_model_path_is_optional(parser: argparse.ArgumentParser) -> None:
    namespace = parser.parse_args([])
    assert namespace.model_path == str(MODEL_DIR)
    assert parser.parse_args(["--model-path", "/m"]).model_path == "/m"
    assert parser.parse_args(["--model", "/m"]).model_path == "/m"


def test_both_kinds_of_flags_are_parsed() -> None:
    server_args, ares_args = parse_args(
        ["--ares-decode-workers", "3", "--tp-size", "2", "--port", "1234", "--model-path", "/m"]
    )
    assert ares_args == AresArgs(decode_workers=3)
    assert (server_args.tp_size, server_args.port, server_args.model_path) == (2, 1234, "/m")


def test_flags_come_from_a_config_file_too(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("ares-decode-workers: 5\nport: 4321\nmodel-path: /from/file\n")
    server_args, ares_args = parse_args(
        ["--config", str(config), "--ares-prefill-workers", "2", "--port", "99"]
    )
    assert ares_args == AresArgs(prefill_workers=2, decode_workers=5)
    assert (server_args.port, server_args.model_path) == (99, "/from/file")


# --- refusal tables -------------------------------------------------------------------------

TABLES = {"CLUSTER": CLUSTER, "MODEL": MODEL, "REQUEST": REQUEST}
ROWS = [pytest.param(row, id=f"{n}-{row.key}") for n, table in TABLES.items() for row in table]


@pytest.mark.parametrize("row", ROWS)
def test_every_row_says_what_why_and_what_to_do(row: Refusal) -> None:
    for text in (row.key, row.what, row.reason, row.remedy):
        assert text.strip() == text and text
    assert row.key.isidentifier(), "metrics and logs use it as a label"
    assert row.reason.endswith(".") and row.remedy.endswith(".")


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_keys_are_unique(table: tuple[Refusal, ...]) -> None:
    assert len({row.key for row in table}) == len(table)


# Raw server arguments as an operator would set them -> the row that must refuse them.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"disaggregation_mode": "prefill"}, "disaggregation_mode"),
    ({"disaggregation_mode": "decode"}, "disaggregation_mode"),
    ({"pp_size": 2}, "pipeline_parallel"),
    ({"dp_size": 2}, "data_parallel"),
    ({"enable_dp_attention": True}, "data_parallel"),
    ({"nnodes": 2}, "multi_node"),
    ({"speculative_algorithm": "EAGLE"}, "speculative"),
    ({"enable_hierarchical_cache": True}, "hierarchical_cache"),
    ({"enable_hisparse": True}, "hierarchical_cache"),
    ({"enable_lmcache": True}, "hierarchical_cache"),
    ({"enable_lora_overlap_loading": True}, "lora_overlap_loading"),
    ({"enable_pd_role_switch": True}, "role_switch"),
    ({"is_embedding": True}, "embedding"),
    ({"skip_tokenizer_init": True}, "skip_tokenizer_init"),
    ({"tokenizer_worker_num": 2}, "tokenizer_workers"),
    ({"grpc_mode": True}, "other_front"),
    ({"smg_grpc_mode": True}, "other_front"),
    ({"use_ray": True}, "other_front"),
    ({"encoder_only": True}, "other_front"),
    ({"enable_pdmux": True}, "other_front"),
]


@pytest.mark.parametrize("fields,key", REFUSED, ids=str)
def test_a_refused_flag_fires_its_row_alone(fields: dict[str, Any], key: str) -> None:
    server_args = ServerArgs(model_path=str(MODEL_DIR), **fields)
    assert [row.key for row in CLUSTER if row.applies(server_args)] == [key]


def test_every_row_is_fired_above() -> None:
    assert {key for _, key in REFUSED} == {row.key for row in CLUSTER}


def test_every_flag_a_row_names_is_fired_above() -> None:
    """A row that lists several flags must mean all of them."""
    import re

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    field_of = {flag: a.dest for a in parser._actions for flag in a.option_strings}
    fired = {name for fields, _ in REFUSED for name in fields}
    for row in CLUSTER:
        for flag in re.findall(r"--[\w-]+", row.what):
            assert flag in field_of, f"upstream has no flag {flag}"
            assert field_of[flag] in fired, flag


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_pages_may_have_any_size(device: str) -> None:
    server_args = ServerArgs(model_path=str(MODEL_DIR), page_size=16, device=device)
    assert first_refusal(CLUSTER, server_args) is None


def test_nothing_is_refused_by_default() -> None:
    assert first_refusal(CLUSTER, ServerArgs(model_path=str(MODEL_DIR))) is None


def test_remedies_name_flags_that_exist() -> None:
    import re

    parser = build_parser()
    known = {flag for a in parser._actions for flag in a.option_strings}
    for table in TABLES.values():
        for row in table:
            for flag in re.findall(r"--[\w-]+", row.remedy):
                assert flag in known, flag


def scheduler_with(**changes: Any) -> SimpleNamespace:
    attributes: dict[str, Any] = {"is_hybrid_ssm": False, "is_hybrid_swa": False}
    multimodal = changes.pop("is_multimodal", False)
    return SimpleNamespace(
        **(attributes | changes), model_config=SimpleNamespace(is_multimodal=multimodal)
    )


@pytest.mark.parametrize(
    "changes,key",
    [
        ({"is_hybrid_ssm": True}, "hybrid_state"),
        ({"is_hybrid_swa": True}, "hybrid_state"),
        ({"is_multimodal": True}, "multimodal"),
        ({}, None),
    ],
)
def test_models_that_cannot_move(changes: dict[str, Any], key: str | None) -> None:
    row = first_refusal(MODEL, scheduler_with(**changes))
    assert (row.key if row else None) == key


# --- preparing the server arguments ---------------------------------------------------------


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What ``prepare_server_args`` leaves behind is undone."""
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.mark.parametrize(
    ("flag", "value"), [("pp_size", 2), ("dp_size", 2), ("disaggregation_mode", "decode")]
)
def test_a_refused_flag_stops_the_start(flag: str, value: Any, environment: None) -> None:
    server_args = ServerArgs(model_path=str(MODEL_DIR), **{flag: value})
    with pytest.raises(AresArgsError) as caught:
        prepare_server_args(server_args, AresArgs())
    text = str(caught.value)
    assert f"--{flag.replace('_', '-')}" in text and "cannot be used" in text
    assert "--ares-decode-workers" in text


def test_a_missing_model_folder_is_named(environment: None) -> None:
    with pytest.raises(AresArgsError) as caught:
        prepare_server_args(ServerArgs(model_path="/no/such/model"), AresArgs())
    text = str(caught.value)
    assert "--model-path '/no/such/model' does not exist" in text
    assert "leave it out" in text


@pytest.mark.parametrize("model_path", ["Qwen/Qwen3-8B", "a.b/c_d-e.f", str(MODEL_DIR)])
def test_a_model_id_or_folder_is_accepted(model_path: str, environment: None) -> None:
    ares_args = AresArgs(decode_workers=3)
    server_args = prepare_server_args(ServerArgs(model_path=model_path), ares_args)
    assert ares_args_of(server_args) is ares_args
    assert Path(control_plane_of(server_args).runtime_dir).is_dir()


# --- the port -------------------------------------------------------------------------------


def test_a_free_port_passes() -> None:
    check_port("127.0.0.1", 0)


def test_a_used_port_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(AresArgsError) as caught:
            check_port("127.0.0.1", port)
    assert f"--port {port}" in str(caught.value)
    assert "in use" in str(caught.value) and "choose another --port" in str(caught.value)
    check_port("127.0.0.1", port)


def test_an_address_of_another_machine_is_an_error() -> None:
    with pytest.raises(AresArgsError, match=r"--host 192\.0\.2\.1 cannot be used"):
        check_port("192.0.2.1", 0)


def test_a_host_that_does_not_resolve_is_an_error() -> None:
    with pytest.raises(AresArgsError, match=r"--host no-such-host\.invalid"):
        check_port("no-such-host.invalid", 0)


def test_an_error_ends_the_command_with_status_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang.srt.utils.kill_process_tree", lambda *a, **k: None)
    assert launch_server.main(["--ares-decode-workers", "0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --ares-decode-workers is 0") and "Traceback" not in error


def test_where_profiles_are_kept() -> None:
    assert parsed("--ares-profile-cache", "off").profile_cache == "off"
    with pytest.raises(AresArgsError, match="--ares-profile-cache is empty; name a directory"):
        AresArgs(profile_cache=" ")
    with pytest.raises(AresArgsError, match="--ares-profile-at-start is 'always'"):
        AresArgs(profile_at_start="always")
