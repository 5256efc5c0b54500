"""Every name and signature of upstream (sglang 0.5.21) that the package relies on.

A new version of upstream fails here with a list, instead of somewhere at run time. The tables are
kept complete by tests that read our own sources: an import, an attribute of an upstream object or
an overridden method that no table mentions fails too.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

import sglang_ares
from sglang_ares import plugin
from sglang_ares.srt.disaggregation import penalties, request_state
from sglang_ares.srt.platforms.cpu import CPU_DEFAULTS

PACKAGE = Path(sglang_ares.__file__).parent
SOURCES = [
    path
    for folder in (PACKAGE, PACKAGE / "srt")
    for path in sorted(folder.glob("*.py") if folder == PACKAGE else folder.rglob("*.py"))
    if path.name not in {"demo.py"}
]
SRT = "sglang.srt"

# (module, below sglang.srt unless it says otherwise; path in it; parameters it must have, in this
# order; the file of ours that uses it).
RELIED_ON: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    # --- entry points, front -----------------------------------------------------------------
    ("entrypoints.engine", "Engine", ("kwargs",), "engine.py"),
    ("entrypoints.engine", "Engine._launch_scheduler_processes",
     ("server_args", "port_args", "run_scheduler_process_func"), "engine.py"),
    ("entrypoints.engine", "Engine._launch_detokenizer_subprocesses",
     ("server_args", "port_args", "run_detokenizer_process_func"), "engine.py"),
    ("entrypoints.engine", "Engine._launch_subprocesses",
     ("server_args", "init_tokenizer_manager_func", "run_scheduler_process_func",
      "run_detokenizer_process_func"), "launch_server.py"),
    ("entrypoints.engine", "Engine.run_detokenizer_process_func", (), "engine.py"),
    ("entrypoints.engine", "Engine.shutdown", (), "engine.py"),
    ("entrypoints.engine", "SchedulerInitResult",
     ("scheduler_infos", "all_child_pids", "wait_for_ready", "block_until_scheduler_exits"),
     "engine.py"),
    ("entrypoints.engine", "_wait_for_scheduler_ready",
     ("scheduler_pipe_readers", "scheduler_procs"), "engine.py"),
    ("entrypoints.engine", "init_tokenizer_manager", ("server_args", "port_args"),
     "tokenizer_manager.py"),
    ("entrypoints.http_server", "_setup_and_run_http_server",
     ("server_args", "tokenizer_manager", "template_manager", "port_args", "scheduler_infos",
      "subprocess_watchdog"), "launch_server.py"),
    ("entrypoints.http_server", "app.include_router", ("router",), "launch_server.py"),
    ("managers.tokenizer_manager", "TokenizerManager.update_control_communicator_fan_out",
     ("worker_count",), "tokenizer_manager.py"),
    ("managers.tokenizer_manager", "TokenizerManager._wait_for_model_update_from_disk", ("obj",),
     "tokenizer_manager.py"),
    ("managers.tokenizer_manager",
     "TokenizerManager._handle_update_weights_from_disk_req_output", ("recv_obj",),
     "tokenizer_manager.py"),
    ("managers.tokenizer_manager", "TokenizerManager.update_active_ranks", ("ranks",),
     "tokenizer_manager.py"),
    ("managers.tokenizer_manager", "TokenizerManager._handle_batch_output", ("recv_obj",),
     "tokenizer_manager.py"),
    ("managers.tokenizer_manager", "TokenizerManager._handle_abort_req", ("recv_obj",),
     "tokenizer_manager.py"),
    ("managers.tokenizer_manager", "TokenizerManager._init_req_state", ("obj", "request"),
     "tokenizer_manager.py"),
    ("managers.io_struct", "EmbeddingReqInput", ("rid",), "tokenizer_manager.py"),
    ("managers.tokenizer_manager", "TokenizerManager.auto_create_handle_loop", (),
     "tokenizer_manager.py"),
    ("managers.tokenizer_manager", "TokenizerManager.generate_request", ("obj", "request"),
     "measure.py"),
    ("managers.tokenizer_manager", "TokenizerManager.flush_cache", (), "measure.py"),
    ("managers.tokenizer_manager", "ReqState", ("obj", "time_stats", "abort_sent"),
     "served_requests.py"),
    ("managers.io_struct", "GenerateReqInput",
     ("rid", "input_ids", "sampling_params", "log_metrics"), "measure.py"),
    ("observability.req_time_stats", "APIServerReqTimeStats.get_first_token_latency", (),
     "served_requests.py"),
    ("observability.req_time_stats", "APIServerReqTimeStats.get_decode_latency", (),
     "served_requests.py"),
    ("utils", "get_device_name", ("device_id",), "law_keeper.py"),
    ("managers.communicator", "FanOutCommunicator", ("send", "fan_out", "mode"),
     "tokenizer_manager.py"),
    ("managers.io_struct", "ActiveRanksOutput", ("status",), "controller.py"),
    ("managers.io_struct", "UpdateWeightFromDiskReqOutput", (), "tokenizer_manager.py"),
    ("managers.io_struct", "ShutdownReq", (), "controller.py"),
    # --- workers on other hosts --------------------------------------------------------------
    ("managers.io_struct", "CloseSessionReqInput", (), "remote_io.py"),
    ("managers.io_struct", "ConfigureLoggingReq", (), "remote_io.py"),
    ("managers.io_struct", "ContinueGenerationReqInput", (), "remote_io.py"),
    ("managers.io_struct", "FlushCacheReqInput", (), "remote_io.py"),
    ("managers.io_struct", "FlushCacheReqOutput", (), "remote_io.py"),
    ("managers.io_struct", "FreezeGCReq", (), "remote_io.py"),
    ("managers.io_struct", "GetInternalStateReq", (), "remote_io.py"),
    ("managers.io_struct", "GetInternalStateReqOutput", (), "remote_io.py"),
    ("managers.io_struct", "HealthCheckOutput", (), "remote_io.py"),
    ("managers.io_struct", "OpenSessionReqInput", (), "remote_io.py"),
    ("managers.io_struct", "PauseGenerationReqInput", (), "remote_io.py"),
    ("managers.io_struct", "BatchTokenizedGenerateReqInput", (), "tokenizer_manager.py"),
    ("managers.tokenizer_manager", "TokenizerManager._dispatch_to_scheduler", ("obj",),
     "tokenizer_manager.py"),
    ("managers.tokenizer_manager", "TokenizerManager._async_dispatch_to_scheduler", ("obj",),
     "tokenizer_manager.py"),
    ("managers.data_parallel_controller", "DataParallelController.send_to_all_workers", ("obj",),
     "controller.py"),
    ("managers.scheduler", "Scheduler.process_input_requests", ("recv_reqs",),
     "remote_requests.py"),
    ("managers.scheduler_components.ipc_channels", "SchedulerIpcChannels",
     ("send_to_tokenizer", "send_to_detokenizer"), "remote_requests.py"),
    ("utils.weight_versions", "WeightVersionSpan", ("version", "start", "end"),
     "remote_outputs.py"),
    ("managers.detokenizer_manager", "run_detokenizer_process",
     ("server_args", "port_args", "detokenizer_manager_class"), "worker_process.py"),
    ("managers.detokenizer_manager", "DetokenizerManager", ("server_args", "port_args"),
     "detokenizer_manager.py"),
    ("managers.detokenizer_manager", "DetokenizerManager.init_running_status",
     ("server_args",), "detokenizer_manager.py"),
    ("managers.detokenizer_manager", "DetokenizerManager.event_loop", (),
     "detokenizer_manager.py"),
    ("managers.detokenizer_manager", "DetokenizerManager.handle_batch_token_id_out",
     ("recv_obj",), "detokenizer_manager.py"),
    ("managers.detokenizer_manager", "DETOKENIZER_MAX_STATES", (), "detokenizer_manager.py"),
    ("managers.io_struct", "BatchTokenIDOutput",
     ("rids", "finished_reasons", "output_ids", "completion_tokens", "reasoning_tokens",
      "cached_tokens", "beam_search_output"), "token_ledger.py"),
    ("managers.io_struct", "BatchStrOutput", (), "detokenizer_manager.py"),
    ("managers.io_struct", "PickleWrapper", (), "detokenizer_manager.py"),
    ("managers.io_struct", "wrap_as_pickle", ("obj",), "detokenizer_manager.py"),
    ("managers.io_struct", "unwrap_from_pickle", ("obj",), "detokenizer_manager.py"),
    ("arg_groups.overrides", "resolution_result", ("server_args", "field"),
     "worker_process.py"),
    ("utils.auth", "AuthLevel.ADMIN_OPTIONAL", (), "admin_api.py"),
    ("utils.auth", "auth_level", ("level",), "admin_api.py"),
    ("utils", "kill_itself_when_parent_died", (), "worker_process.py"),
    ("utils", "kill_process_tree", ("parent_pid", "include_parent"), "launch_server.py"),
    ("utils.network", "get_free_port", (), "cluster.py"),
    ("utils.network", "get_local_ip_auto", ("fallback",), "control_plane.py"),
    ("utils.network", "get_zmq_socket", ("context", "socket_type", "endpoint", "bind"),
     "controller.py"),
    ("utils.server_args_config_parser", "ConfigArgumentMerger", ("parser",), "launch_server.py"),
    ("utils.server_args_config_parser", "ConfigArgumentMerger.merge_config_with_args",
     ("cli_args",), "launch_server.py"),
    ("plugins", "load_plugins", (), "launch_server.py"),
    ("plugins.hook_registry", "HookRegistry.register", ("target", "hook", "hook_type"),
     "plugin.py"),
    ("plugins.hook_registry", "HookRegistry.apply_hooks", (), "plugin.py"),
    ("plugins.hook_registry", "HookType.REPLACE", (), "plugin.py"),
    ("plugins.hook_registry", "HookType.AROUND", (), "plugin.py"),
    ("plugins.hook_registry", "HookType.AFTER", (), "plugin.py"),
    ("server_args", "ServerArgs.add_cli_args", ("parser",), "launch_server.py"),
    ("server_args", "ServerArgs.from_cli_args", ("args",), "launch_server.py"),
    ("server_args", "ServerArgs.resolve_once", (), "worker_process.py"),
    ("server_args", "PortArgs.init_new", ("server_args",), "control_plane.py"),
    ("arg_groups.arg_utils", "record_fields", ("cls",), "platforms/cpu.py"),
    ("runtime_context", "get_parallel", (), "scheduler.py"),
    ("runtime_context", "get_observability", (), "load_snapshots.py"),
    ("sglang.utils", "TypeBasedDispatcher", ("mapping",), "controller.py"),
    # --- controller --------------------------------------------------------------------------
    ("managers.data_parallel_controller", "DataParallelController",
     ("server_args", "port_args"), "controller.py"),
    ("managers.data_parallel_controller", "DataParallelController.launch_dp_schedulers",
     ("server_args", "port_args"), "controller.py"),
    ("managers.data_parallel_controller", "DataParallelController.init_dispatcher", (),
     "controller.py"),
    ("managers.data_parallel_controller", "DataParallelController.event_loop", (),
     "controller.py"),
    ("managers.data_parallel_controller", "DataParallelController.send_control_message",
     ("obj",), "controller.py"),
    ("managers.data_parallel_controller", "run_data_parallel_controller_process",
     ("server_args", "port_args", "pipe_writer"), "controller.py"),
    ("managers.io_struct", "sock_send", ("socket", "obj"), "controller.py"),
    ("managers.utils", "is_health_check_generate_req", ("recv_req",), "controller.py"),
    ("disaggregation.utils", "FAKE_BOOTSTRAP_HOST", (), "controller.py"),
    ("managers.io_struct", "sock_recv", ("socket", "flags"), "controller.py"),
    ("managers.io_struct", "AbortReq", ("rid", "abort_all", "finished_reason"), "controller.py"),
    ("managers.load_snapshot", "ShmLoadSnapshotWriter",
     ("path", "dp_size", "dp_rank", "publish_interval"), "load_snapshots.py"),
    ("managers.load_snapshot", "ShmLoadSnapshotWriter.write", ("snapshot",),
     "load_snapshots.py"),
    ("managers.load_snapshot", "ShmLoadSnapshotReader", ("path", "dp_size"),
     "load_snapshots.py"),
    ("managers.load_snapshot", "shm_path_for", ("ipc_name",), "load_snapshots.py"),
    ("managers.load_snapshot", "LoadSnapshot", ("dp_rank",), "load_snapshots.py"),
    # --- scheduler ---------------------------------------------------------------------------
    ("managers.scheduler", "run_scheduler_process",
     ("server_args", "port_args", "gpu_id", "tp_rank"), "worker_process.py"),
    ("managers.scheduler", "Scheduler", ("server_args", "port_args"), "scheduler.py"),
    ("managers.scheduler", "Scheduler.init_ipc_channels", ("port_args",), "scheduler.py"),
    ("managers.scheduler", "Scheduler.init_idle_sleeper", (), "scheduler.py"),
    ("managers.scheduler", "Scheduler.init_request_receiver", (), "scheduler.py"),
    ("managers.scheduler_components.request_receiver", "SchedulerRequestReceiver", (),
     "control_intake.py"),
    ("managers.scheduler_components.request_receiver",
     "SchedulerRequestReceiver._broadcast_reqs_across_ranks", ("recv_reqs", "local_reqs"),
     "control_intake.py"),
    ("managers.scheduler", "Scheduler.init_disaggregation", (), "scheduler.py"),
    ("managers.scheduler", "Scheduler._sync_disaggregation_mode_to_subcomponents", (),
     "roles.py"),
    ("managers.tp_worker", "TpModelWorker.ensure_decode_cuda_graphs", ("capture_bs",),
     "roles.py"),
    ("managers.schedule_batch", "ScheduleBatch", ("reqs", "batch_is_full"), "roles.py"),
    ("disaggregation.prefill", "PrefillBootstrapQueue",
     ("token_to_kv_pool", "draft_token_to_kv_pool", "req_to_metadata_buffer_idx_allocator",
      "metadata_buffers", "gpu_id", "bootstrap_port", "gloo_group", "max_total_num_tokens",
      "scheduler", "scheduler_stage_metrics", "transfer_backend"), "roles.py"),
    ("disaggregation.role_switch", "PdRoleSwitchRestart", (), "role_switch.py"),
    ("runtime_context", "get_context", (), "roles.py"),
    ("runtime_context", "RuntimeContext.override", (), "roles.py"),
    ("runtime_context", "get_device", (), "roles.py"),
    ("environ", "envs", (), "refusals.py"),
    ("managers.scheduler", "Scheduler.get_output_streamer_class", (), "scheduler.py"),
    ("managers.scheduler", "Scheduler.ingest_requests", (), "scheduler.py"),
    ("managers.scheduler", "Scheduler.process_decode_queue", (), "scheduler.py"),
    ("managers.scheduler", "Scheduler.process_batch_result", ("batch", "result"),
     "scheduler.py"),
    ("managers.scheduler", "Scheduler.run_batch", ("batch",), "scheduler.py"),
    ("managers.scheduler", "Scheduler.on_idle", (), "scheduler.py"),
    ("managers.scheduler", "Scheduler.is_fully_idle", ("for_health_check", "ignore_waiting"),
     "scheduler.py"),
    ("managers.scheduler", "Scheduler.handle_generate_request", ("recv_req",), "scheduler.py"),
    ("managers.scheduler", "Scheduler._add_request_to_queue", ("req", "is_retracted"),
     "scheduler.py"),
    ("managers.scheduler", "Scheduler._set_or_validate_priority", ("req",), "scheduler.py"),
    ("managers.scheduler", "Scheduler.can_schedule_lora_req", ("req", "running_loras"),
     "scheduler.py"),
    ("lora.lora_manager", "LoRAManager.validate_lora_batch", ("lora_ids",), "migration_host.py"),
    ("managers.scheduler", "Scheduler.abort_request", ("recv_req",), "scheduler.py"),
    ("managers.scheduler", "Scheduler.get_new_prebuilt_batch", ("running_batch",),
     "scheduler.py"),
    ("managers.scheduler", "Scheduler._get_new_prebuilt_batch", ("running_batch",),
     "scheduler.py"),
    ("managers.scheduler_components.ipc_channels", "SchedulerIpcChannels",
     ("send_to_tokenizer",), "scheduler.py"),
    ("managers.scheduler_components.output_sender", "SenderWrapper", ("socket",),
     "output_streamer.py"),
    ("managers.scheduler_components.output_sender", "SenderWrapper.send_output",
     ("output", "recv_obj"), "output_streamer.py"),
    ("managers.scheduler_components.output_streamer", "SchedulerOutputStreamer.stream_output",
     ("reqs", "return_logprob", "skip_req"), "output_streamer.py"),
    ("managers.scheduler_components.idle_sleeper", "IdleSleeper", (), "scheduler.py"),
    ("managers.schedule_batch", "FINISH_ABORT", ("message",), "output_streamer.py"),
    ("managers.schedule_batch", "ScheduleBatch.filter_batch", ("keep_indices",),
     "migration_host.py"),
    ("managers.schedule_batch", "Req", ("rid", "origin_input_text", "origin_input_ids",
                                        "sampling_params"), "request_state.py"),
    ("managers.schedule_batch", "Req.finished", (), "source.py"),
    ("managers.schedule_batch", "Req.seqlen", (), "worker_agent.py"),
    ("managers.schedule_batch", "Req.init_incremental_detokenize", (), "request_state.py"),
    ("managers.io_struct", "TokenizedGenerateReqInput",
     (*request_state._SPEC_FIELDS, "input_ids", "input_embeds", "mm_inputs", "token_type_ids",
      "bootstrap_host", "bootstrap_port", "bootstrap_room"), "request_state.py"),
    *(("managers.io_struct", name, fields, "run_time_changes.py") for name, fields in (
        ("LoadLoRAAdapterReqInput", ("lora_name", "lora_path", "lora_id")),
        ("UnloadLoRAAdapterReqInput", ("lora_name", "lora_id")),
        ("LoRAUpdateOutput", ("success", "error_message")),
        ("LoadLoRAAdapterFromTensorsReqInput", ()),
        ("UpdateWeightFromDiskReqInput", ()),
        ("UpdateWeightsFromDistributedReqInput", ()),
        ("UpdateWeightsFromIPCReqInput", ()),
        ("UpdateWeightsFromTensorReqInput", ()),
    )),
    ("managers.scheduler", "Scheduler.init_request_dispatcher", (), "scheduler.py"),
    ("sampling.sampling_params", "SamplingParams.verify", ("self", "vocab_size"), "checks.py"),
    ("sampling.sampling_params", "MAX_STOP_COUNT", (), "checks.py"),
    ("sampling.sampling_params", "MAX_STOP_REGEX_COUNT", (), "checks.py"),
    ("sampling.sampling_params", "MAX_STOP_REGEX_LEN", (), "checks.py"),
    ("sampling.sampling_params", "SamplingParams",
     ("max_new_tokens", "sampling_seed", "beam_width", "n"), "request_state.py"),
    ("observability.req_time_stats", "SchedulerReqTimeStats.set_wait_queue_entry_time", (),
     "migration_host.py"),
    ("observability.req_time_stats",
     "SchedulerReqTimeStats.set_decode_prealloc_queue_entry_time", (), "scheduler.py"),
    ("constrained.base_grammar_backend", "BaseGrammarObject.accept_token", ("token",),
     "request_state.py"),
    ("model_executor.forward_batch_info", "ForwardMode.is_decode", (), "scheduler.py"),
    # --- the emulated forward ----------------------------------------------------------------
    ("managers.utils", "GenerationBatchResult", ("logits_output", "next_token_ids"),
     "forward.py"),
    ("layers.logits_processor", "LogitsProcessorOutput", ("next_token_logits",), "forward.py"),
    ("model_executor.forward_batch_info", "ForwardMode.is_extend", (), "forward.py"),
    # --- memory ------------------------------------------------------------------------------
    ("mem_cache.common", "release_kv_cache", ("req", "tree_cache", "is_insert"),
     "migration_host.py"),
    ("mem_cache.common", "kv_to_page_indices", ("kv_indices", "page_size"), "kv_link.py"),
    ("mem_cache.allocator.base", "BaseTokenToKVPoolAllocator.free", ("free_index",),
     "migration_host.py"),
    ("mem_cache.allocator.base", "BaseTokenToKVPoolAllocator.available_size", (),
     "worker_agent.py"),
    ("mem_cache.allocator", "PagedTokenToKVPoolAllocator", (), "paged_allocator.py"),
    ("mem_cache.allocator", "PagedTokenToKVPoolAllocator.merge_and_sort_free", (),
     "paged_allocator.py"),
    ("mem_cache.allocator", "alloc_extend_naive",
     ("prefix_lens", "seq_lens", "last_loc", "free_pages", "out_indices", "page_size", "device"),
     "paged_allocator.py"),
    ("utils", "get_num_new_pages", ("seq_lens", "page_size", "prefix_lens"),
     "paged_allocator.py"),
    ("mem_cache.memory_pool", "MHATokenToKVPool", (), "platforms/cpu.py"),
    ("mem_cache.base_prefix_cache", "BasePrefixCache.evictable_size", (), "worker_agent.py"),
    ("mem_cache.base_prefix_cache", "BasePrefixCache.protected_size", (), "worker_agent.py"),
    ("mem_cache.base_prefix_cache", "BasePrefixCache.unpin", ("req",), "migration_host.py"),
    ("mem_cache.base_prefix_cache", "BasePrefixCache.inc_lock_ref", ("node",),
     "migration_host.py"),
    ("mem_cache.base_prefix_cache", "IncLockRefResult.to_dec_params", (), "migration_host.py"),
    ("mem_cache.base_prefix_cache", "MatchResult", ("device_indices", "last_device_node"),
     "migration_host.py"),
    ("managers.schedule_policy", "match_prefix_for_req",
     ("tree_cache", "req", "token_ids", "include_req"), "migration_host.py"),
    ("runtime_context", "get_disagg", (), "migration_host.py"),
    ("configs.model_config", "ModelConfig.get_total_num_kv_heads", (), "kv_link.py"),
    # --- KV transfer -------------------------------------------------------------------------
    ("disaggregation.decode", "DecodePreallocQueue._pre_alloc",
     ("req", "prefix_indices", "prefix_len"), "migration_host.py"),
    ("disaggregation.decode", "DecodePreallocQueue._allocatable_token_budgets",
     ("count_retracted", "extra_reserved_reqs"), "migration_host.py"),
    ("disaggregation.decode", "DecodePreallocQueue.add", ("req", "is_rebootstrap"), "resume.py"),
    ("managers.scheduler_components.batch_result_processor",
     "SchedulerBatchResultProcessor._maybe_update_reasoning_tokens", ("req", "next_token_id"),
     "resume.py"),
    ("disaggregation.decode", "DecodeTransferQueue", (), "scheduler.py"),
    ("disaggregation.prefill", "PrefillBootstrapQueue", (), "scheduler.py"),
    ("disaggregation.utils", "DisaggregationMode.PREFILL", (), "kv_link.py"),
    ("disaggregation.utils", "DisaggregationMode.DECODE", (), "scheduler.py"),
    ("disaggregation.utils", "KVClassType.MANAGER", (), "kv_link.py"),
    ("disaggregation.utils", "KVClassType.SENDER", (), "kv_link.py"),
    ("disaggregation.utils", "KVClassType.RECEIVER", (), "kv_link.py"),
    ("disaggregation.utils", "KVClassType.BOOTSTRAP_SERVER", (), "worker_process.py"),
    ("disaggregation.utils", "TransferBackend", ("value",), "worker_process.py"),
    ("disaggregation.utils", "get_kv_class", ("transfer_backend", "class_type"), "kv_link.py"),
    ("disaggregation.utils", "poll_and_all_reduce", ("pollers", "gloo_group"), "kv_link.py"),
    ("disaggregation.utils", "ReqToMetadataIdxAllocator.alloc", (), "migration_host.py"),
    ("disaggregation.utils", "ReqToMetadataIdxAllocator.free", ("free_index",),
     "migration_host.py"),
    ("disaggregation.utils", "ReqToMetadataIdxAllocator.available_size", (), "worker_agent.py"),
    ("disaggregation.base.conn", "KVPoll", (), "source.py"),
    ("disaggregation.base.conn", "BaseKVManager",
     ("args", "disaggregation_mode", "server_args", "is_mla_backend"), "kv_link.py"),
    ("disaggregation.common.conn", "CommonKVManager.try_ensure_parallel_info",
     ("bootstrap_addr",), "kv_link.py"),
    ("disaggregation.common.conn", "CommonKVManager.submit_prefill_recompute",
     ("kv_receiver", "payload"), "resume.py"),
    ("disaggregation.common.conn", "CommonKVSender",
     ("mgr", "bootstrap_addr", "bootstrap_room", "dest_tp_ranks", "pp_rank"), "kv_link.py"),
    ("disaggregation.common.conn", "CommonKVSender.init", ("num_kv_indices", "aux_index"),
     "source.py"),
    ("disaggregation.common.conn", "CommonKVSender.send",
     ("kv_indices", "state_indices", "num_kv_tokens"), "source.py"),
    ("disaggregation.common.conn", "CommonKVSender.abort", (), "source.py"),
    ("disaggregation.common.conn", "CommonKVSender.clear", (), "source.py"),
    ("disaggregation.common.conn", "CommonKVSender.get_transfer_metric", (), "kv_link.py"),
    ("disaggregation.common.conn", "CommonKVReceiver",
     ("mgr", "bootstrap_addr", "bootstrap_room"), "kv_link.py"),
    ("disaggregation.common.conn", "CommonKVReceiver.init", ("prefill_dp_rank",), "kv_link.py"),
    ("disaggregation.common.conn", "CommonKVReceiver.abort", (), "target.py"),
    ("disaggregation.common.conn", "CommonKVReceiver.clear", (), "target.py"),
    ("disaggregation.nixl.conn", "NixlKVSender.send",
     ("kv_indices", "state_indices", "num_kv_tokens"), "source.py"),
    ("disaggregation.nixl.conn", "NixlKVReceiver.send_metadata",
     ("kv_indices", "aux_index", "state_indices", "decode_prefix_len"), "target.py"),
    ("disaggregation.nixl.conn", "NixlKVManager",
     ("args", "disaggregation_mode", "server_args", "is_mla_backend"), "kv_link.py"),
    # --- the length predictor ----------------------------------------------------------------
    ("managers.auxiliary_output", "CommittedTokens", ("output_index", "token_ids"),
     "tracker.py"),
    ("managers.auxiliary_output", "append_auxiliary_output", ("current", "output"),
     "runtime.py"),
    ("managers.auxiliary_output", "DeviceAuxiliaryOutput.copy_to_host", ("copy_tensor",),
     "runtime.py"),
    ("managers.auxiliary_output", "HostAuxiliaryOutput.consume", ("batch", "commits"),
     "runtime.py"),
    ("managers.utils", "GenerationBatchResult.copy_auxiliary_output_to_cpu", (), "runtime.py"),
    ("layers.logits_processor", "LogitsProcessorOutput",
     ("customized_info", "auxiliary_device_output"), "runtime.py"),
    # --- the CPU platform --------------------------------------------------------------------
    ("platforms.cpu", "CpuDeviceMixin", (), "platforms/cpu.py"),
    ("platforms.device_mixin", "PlatformEnum.OOT", (), "platforms/cpu.py"),
    ("platforms.interface", "SRTPlatform", (), "platforms/cpu.py"),
    # --- sampling ----------------------------------------------------------------------------
    ("sampling.penaltylib.orchestrator", "BatchedPenalizerOrchestrator", (), "penalties.py"),
    ("sampling.sampling_batch_info", "SamplingBatchInfo", (), "plugin.py"),
    ("managers.schedule_batch", "ScheduleBatch", (), "penalties.py"),
)  # fmt: skip

# What is hooked by name: target, our hook, and the parameters the hook counts on.
HOOKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (plugin.SCHEDULER, ("server_args", "port_args")),
    (plugin.CONTROLLER, ("server_args", "port_args")),
    (plugin.SAMPLING_INFO, ("batch",)),
    (plugin.PENALTY_FEED, ("self",)),
    (plugin.FORWARD, ("self", "batch")),
    (plugin.KV_PEER, ("self", "decode_kv_args")),
    (plugin.PRUNED_STATES, ("self", "hidden_states")),
    (plugin.LOGITS, ("self", "input_ids", "hidden_states")),
    (plugin.SAMPLE, ("self", "logits_output", "forward_batch")),
    (plugin.SEEDED_DRAW, ("logprobs", "seed", "positions")),
    (
        plugin.TORCH_SAMPLER,
        (
            "probs",
            "top_ks",
            "top_ps",
            "min_ps",
            "need_min_p_sampling",
            "sampling_seed",
            "positions",
        ),
    ),
)

# Our subclasses of upstream's classes, and the methods by which they change upstream. Upstream
# calls them; were one renamed, ours would silently never run.
OVERRIDES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "AresScheduler": (
        "sglang_ares.srt.managers.scheduler",
        "sglang.srt.managers.scheduler.Scheduler",
        (
            "__init__", "init_ipc_channels", "init_idle_sleeper", "init_disaggregation",
            "init_request_receiver",
            "get_output_streamer_class", "ingest_requests", "process_decode_queue",
            "process_batch_result", "_copy_auxiliary_output_to_cpu", "run_batch", "on_idle",
            "is_fully_idle",
            "handle_generate_request", "_add_request_to_queue", "abort_request",
            "can_schedule_lora_req",
            "get_new_prebuilt_batch", "_get_new_prebuilt_batch",
        ),
    ),
    "AresController": (
        "sglang_ares.srt.managers.controller",
        "sglang.srt.managers.data_parallel_controller.DataParallelController",
        ("launch_dp_schedulers", "init_dispatcher", "event_loop", "send_control_message",
         "send_to_all_workers"),
    ),
    "Engine": (
        "sglang_ares.engine",
        "sglang.srt.entrypoints.engine.Engine",
        (
            "__init__", "_launch_subprocesses", "_launch_scheduler_processes",
            "_launch_detokenizer_subprocesses", "shutdown", "init_tokenizer_manager_func",
        ),
    ),
    "AresTokenizerManager": (
        "sglang_ares.srt.managers.tokenizer_manager",
        "sglang.srt.managers.tokenizer_manager.TokenizerManager",
        (
            "update_active_ranks", "_dispatch_to_scheduler", "_async_dispatch_to_scheduler",
            "update_request_meta_info", "_handle_batch_output", "_handle_abort_req",
            "auto_create_handle_loop", "create_abort_task", "_init_req_state",
            "_handle_update_weights_from_disk_req_output",
        ),
    ),
    "AresOutputStreamer": (
        "sglang_ares.srt.managers.output_streamer",
        "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer",
        (
            "stream_output", "has_additional_customized_info",
            "should_build_additional_customized_info", "build_additional_customized_info",
        ),
    ),
    "AresDetokenizerManager": (
        "sglang_ares.srt.managers.detokenizer_manager",
        "sglang.srt.managers.detokenizer_manager.DetokenizerManager",
        ("init_running_status", "event_loop", "handle_batch_token_id_out"),
    ),
    "ControlRequestReceiver": (
        "sglang_ares.srt.managers.control_intake",
        "sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver",
        ("__init__", "_broadcast_reqs_across_ranks"),
    ),
    "WorkerLoadWriter": (
        "sglang_ares.srt.managers.load_snapshots",
        "sglang.srt.managers.load_snapshot.ShmLoadSnapshotWriter",
        ("__init__", "write"),
    ),
    "AresCpuPlatform": (
        "sglang_ares.srt.platforms.cpu",
        "sglang.srt.platforms.interface.SRTPlatform",
        (
            "__init__", "_enum", "get_default_attention_backend", "is_pin_memory_available",
            "get_mha_kv_pool_cls", "get_paged_allocator_cls",
        ),
    ),
    "CpuPagedAllocator": (
        "sglang_ares.srt.platforms.paged_allocator",
        "sglang.srt.mem_cache.allocator.PagedTokenToKVPoolAllocator",
        ("alloc_extend", "alloc_decode"),
    ),
}  # fmt: skip

# Expressions in our sources that hold an upstream object, and its class(es) below sglang.srt.
BATCH = "managers.schedule_batch.ScheduleBatch"
REQ = "managers.schedule_batch.Req"
KV = "managers.schedule_batch.ReqKvInfo"
ALLOCATOR = "mem_cache.allocator.base.BaseTokenToKVPoolAllocator"
METADATA_SLOTS = "disaggregation.utils.ReqToMetadataIdxAllocator"
PREALLOC = "disaggregation.decode.DecodePreallocQueue"
ROWS = "disaggregation.decode.DecodeReqToTokenPool"
SCHEDULER = "managers.scheduler.Scheduler"
PENALTIES = "sampling.penaltylib."
HOLDS: dict[str, tuple[str, ...]] = {
    "req": (REQ, "managers.io_struct.TokenizedGenerateReqInput"),
    "landing.req": (REQ,),
    "self.req": (REQ,),
    "req.kv": (KV,),
    "r.kv": (KV,),
    "self.req.kv": (KV,),
    "waiting.req": (REQ,),
    "decode_req": ("disaggregation.decode.DecodeRequest",),
    "decode_req.kv_receiver": ("disaggregation.nixl.conn.NixlKVReceiver",),
    "req.finished_reason": ("managers.schedule_batch.FINISH_ABORT",),
    "req.grammar": ("constrained.base_grammar_backend.BaseGrammarObject",),
    "req.time_stats": ("observability.req_time_stats.SchedulerReqTimeStats",),
    "req.sampling_params": ("sampling.sampling_params.SamplingParams",),
    "r.sampling_params": ("sampling.sampling_params.SamplingParams",),
    "params": ("sampling.sampling_params.SamplingParams",),
    "recv_req": ("managers.io_struct.TokenizedGenerateReqInput", "managers.io_struct.AbortReq"),
    "abort": ("managers.io_struct.AbortReq",),
    "batch": (BATCH, "managers.io_struct.BatchTokenIDOutput"),
    "self.running_batch": (BATCH,),
    "self.last_batch": (BATCH,),
    "scheduler.running_batch": (BATCH,),
    "self._scheduler.running_batch": (BATCH,),
    "batch.forward_mode": ("model_executor.forward_batch_info.ForwardMode",),
    "batch.sampling_info": ("sampling.sampling_batch_info.SamplingBatchInfo",),
    "orchestrator": (PENALTIES + "orchestrator.BatchedPenalizerOrchestrator",),
    "penalizer": (
        PENALTIES + "BatchedFrequencyPenalizer",
        PENALTIES + "BatchedPresencePenalizer",
        PENALTIES + "BatchedRepetitionPenalizer",
        PENALTIES + "BatchedMinNewTokensPenalizer",
    ),
    "scheduler": (SCHEDULER,),
    "self._scheduler": (SCHEDULER,),
    "self.idle_sleeper": ("managers.scheduler_components.idle_sleeper.IdleSleeper",),
    "self.grammar_manager": ("constrained.grammar_manager.GrammarManager",),
    "tp_worker": ("managers.tp_worker.TpModelWorker",),
    "tp_worker.model_config": ("configs.model_config.ModelConfig",),
    "scheduler.model_config": ("configs.model_config.ModelConfig",),
    "scheduler.tp_worker": ("managers.tp_worker.TpModelWorker",),
    "scheduler.tp_worker.model_runner": ("model_executor.model_runner.ModelRunner",),
    "adapters": ("lora.lora_manager.LoRAManager",),
    "scheduler.tree_cache": ("mem_cache.base_prefix_cache.BasePrefixCache",),
    "tree": ("mem_cache.base_prefix_cache.BasePrefixCache",),
    "self._scheduler.tree_cache": ("mem_cache.base_prefix_cache.BasePrefixCache",),
    "match": ("mem_cache.base_prefix_cache.MatchResult",),
    "lock": ("mem_cache.base_prefix_cache.IncLockRefResult",),
    "scheduler.req_to_token_pool": (ROWS,),
    "self._scheduler.req_to_token_pool": (ROWS,),
    "scheduler.token_to_kv_pool_allocator": (ALLOCATOR,),
    "allocator": (ALLOCATOR,),
    "pool": (
        "mem_cache.memory_pool.MHATokenToKVPool",
        "mem_cache.memory_pool.MLATokenToKVPool",
    ),
    "scheduler.req_to_metadata_buffer_idx_allocator": (METADATA_SLOTS,),
    "self._scheduler.req_to_metadata_buffer_idx_allocator": (METADATA_SLOTS,),
    "self._scheduler.disagg_metadata_buffers": ("disaggregation.utils.MetadataBuffers",),
    "queue": (PREALLOC,),
    "scheduler.disagg_decode_prealloc_queue": (PREALLOC,),
    "self._scheduler.disagg_decode_prealloc_queue": (PREALLOC,),
    "transfers": ("disaggregation.decode.DecodeTransferQueue",),
    "self._scheduler.disagg_decode_transfer_queue": ("disaggregation.decode.DecodeTransferQueue",),
    "scheduler.disagg_decode_transfer_queue": ("disaggregation.decode.DecodeTransferQueue",),
    "self.disagg_decode_transfer_queue": ("disaggregation.decode.DecodeTransferQueue",),
    "self.disagg_prefill_bootstrap_queue": ("disaggregation.prefill.PrefillBootstrapQueue",),
    "processor": (
        "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor",
    ),
    "queue.kv_manager": ("disaggregation.nixl.conn.NixlKVManager",),
    "self._receive_manager": ("disaggregation.nixl.conn.NixlKVManager",),
    "sender": ("disaggregation.nixl.conn.NixlKVSender",),
    "self._sender": (
        "disaggregation.nixl.conn.NixlKVSender",
        "managers.scheduler_components.output_sender.SenderWrapper",
    ),
    "communicator": ("managers.communicator.FanOutCommunicator",),
    "ranks": ("managers.io_struct.ActiveRanksOutput",),
    "sender.get_transfer_metric()": ("disaggregation.base.conn.KVTransferMetric",),
    "receiver": ("disaggregation.nixl.conn.NixlKVReceiver",),
    "self._receiver": ("disaggregation.nixl.conn.NixlKVReceiver",),
    "send_manager": ("disaggregation.nixl.conn.NixlKVManager",),
    "send_manager.kv_args": ("disaggregation.base.conn.KVArgs",),
    "scheduler.server_args": ("server_args.ServerArgs",),
    "server_args": ("server_args.ServerArgs",),
    "worker_args": ("server_args.ServerArgs",),
    "self.server_args": ("server_args.ServerArgs",),
    "port_args": ("server_args.PortArgs",),
    "front": ("server_args.PortArgs",),
    "w.port_args": ("server_args.PortArgs",),
    "tokenizer_manager": ("managers.tokenizer_manager.TokenizerManager",),
    "tokenizer_manager.model_config": ("configs.model_config.ModelConfig",),
    "scheduler.ipc_channels": ("managers.scheduler_components.ipc_channels.SchedulerIpcChannels",),
    "scheduler.ipc_channels.send_to_tokenizer": (
        "managers.scheduler_components.output_sender.SenderWrapper",
    ),
    "KVPoll": ("disaggregation.base.conn.KVPoll",),
}
# Configuration bags: their fields are declared in these modules.
BAGS = {
    "get_parallel()": "arg_groups.fields.parallel",
    "get_observability()": "arg_groups.fields.observability",
    "get_disagg()": "arg_groups.fields.disagg",
    "get_device()": "arg_groups.fields.device",
}
# Expressions that start like one of the above and hold something of ours or of Python.
NOT_UPSTREAMS = {
    "req.output_ids", "self._scheduler.ares", "scheduler.ares", "self._scheduler.ares.received",
    "self._scheduler.waiting_queue", "orchestrator.penalizers", "pool.endpoint",
    "scheduler.predictions",
    "penalizer.frequency_penalties[row, 0]", "self.idle_sleeper.poller", "batch.reqs",
    "communicator._result_event", "batch.seq_lens", "scheduler.emulated",
    "scheduler.spec", "self._scheduler.spec", "self._scheduler.intake",
    "scheduler.ares.dropped", "self._scheduler.ares.dropped",
}  # fmt: skip
# Attributes that we put on upstream's objects ourselves.
OURS = {
    "server_args": {"_ares_args", "_ares_control"},
    "self.server_args": {"_ares_args", "_ares_control"},
    "tokenizer_manager": {"workers_here", "serving", "attainment", "slo_metrics"},
    "scheduler": {"spec"},
    "self._scheduler": {"spec"},
}
# Attributes that upstream sets on an object outside its class, and the module that reads them.
SET_ELSEWHERE = {
    (REQ, "pd_rebootstrap_in_progress"): "disaggregation.decode",
}


# --- reading upstream -----------------------------------------------------------------------


def absolute(name: str) -> str:
    """A name of the tables, with its package."""
    return name if name.startswith("sglang.") else f"{SRT}.{name}"


def resolve(path: str) -> Any:
    """The object called ``path``, a dotted name below ``sglang.srt`` or an absolute one."""
    return pkgutil.resolve_name(absolute(path))


def parameters(target: Any) -> list[str]:
    if isinstance(target, type) and issubclass(target, msgspec.Struct):
        return [f.name for f in msgspec.structs.fields(target)]
    return list(inspect.signature(target).parameters)


def stored_on_self(tree: ast.AST) -> set[str]:
    """Attributes that the code assigns to ``self``."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


@cache
def declared_in(module: str) -> frozenset[str]:
    """Names declared in a module's classes."""
    tree = ast.parse(inspect.getsource(importlib.import_module(f"{SRT}.{module}")))
    targets = [
        t
        for node in ast.walk(tree)
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for t in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    return frozenset(t.id for t in targets if isinstance(t, ast.Name))


@cache
def attributes(cls: type) -> frozenset[str]:
    """Names an instance has: class attributes, declared fields, and what methods assign."""
    names = set(dir(cls))
    for base in cls.__mro__:
        names |= set(getattr(base, "__annotations__", {}))
        if not base.__module__.startswith("sglang"):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        names |= stored_on_self(tree)
    if dataclasses.is_dataclass(cls):
        names |= {f.name for f in dataclasses.fields(cls)}
    return frozenset(names)


# --- reading our own sources ----------------------------------------------------------------


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in SOURCES:
        yield path, ast.parse(path.read_text())


def imports() -> list[tuple[str, str, str]]:
    """(file, module, name) of everything imported from upstream."""
    found = []
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sglang":
                found += [(path.name, node.module or "", a.name) for a in node.names]
            elif isinstance(node, ast.Import):
                found += [
                    (path.name, a.name, "") for a in node.names if a.name.split(".")[0] == "sglang"
                ]
    return sorted(set(found))


def accesses() -> list[tuple[str, str, str]]:
    """(file, expression, attribute) of every attribute read or set in our sources."""
    found = set()
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                found.add((path.name, ast.unparse(node.value), node.attr))
    return sorted(found)


# Files where a name of HOLDS means something else.
ELSEWHERE = {
    ("receiver", "mailbox.py"), ("req", "ares_args.py"), ("params", "ares_args.py"),
    ("pool", "metrics.py"),
}  # fmt: skip
UPSTREAM_ACCESSES = [
    (file, expression, attribute)
    for file, expression, attribute in accesses()
    if (expression in HOLDS or expression in BAGS) and (expression, file) not in ELSEWHERE
]


# --- the tests ------------------------------------------------------------------------------


def test_the_version_is_the_one_read() -> None:
    assert version("sglang") == "0.5.21", "go through the tables with the new version's source"


@pytest.mark.parametrize(
    "module,path,required,user", RELIED_ON, ids=[f"{m}.{p}" for m, p, *_ in RELIED_ON]
)
def test_upstream_has(module: str, path: str, required: tuple[str, ...], user: str) -> None:
    target: Any = importlib.import_module(absolute(module))
    for part in path.split("."):
        assert hasattr(target, part), f"{module} has no {path}, which {user} uses"
        target = getattr(target, part)
    if required:
        names = parameters(target)
        takes_any = any(
            p.kind is p.VAR_KEYWORD for p in inspect.signature(target).parameters.values()
        )
        missing = [] if takes_any else [name for name in required if name not in names]
        assert not missing, f"{path}({', '.join(names)}) lacks {missing}, which {user} passes"
        order = [n for n in names if n in required]
        if not isinstance(target, type):
            assert order == [n for n in required if n in names], f"order of {path}'s parameters"


@pytest.mark.parametrize("file,module,name", imports())
def test_every_import_resolves_and_is_in_the_table(file: str, module: str, name: str) -> None:
    imported = importlib.import_module(module)
    if not name:
        return
    assert hasattr(imported, name), f"{module} has no {name}, which {file} imports"
    described = {(absolute(m), p.split(".")[0]) for m, p, *_ in RELIED_ON}
    described |= {
        tuple(f"{SRT}.{path}".rsplit(".", 1)) for paths in HOLDS.values() for path in paths
    }
    assert (module, name) in described, f"{name}, which {file} imports, is in no table"


def test_imports_were_found() -> None:
    assert len(imports()) > 30
    assert len(UPSTREAM_ACCESSES) > 100


@pytest.mark.parametrize("target,required", HOOKS, ids=[t.rsplit(".", 1)[1] for t, _ in HOOKS])
def test_what_is_hooked_exists(target: str, required: tuple[str, ...]) -> None:
    hooked = pkgutil.resolve_name(target)
    assert callable(hooked)
    names = parameters(hooked)
    assert names[: len(required)] == list(required), f"{target}({', '.join(names)})"


def test_every_hook_is_in_the_table() -> None:
    hooked = {v for k, v in vars(plugin).items() if isinstance(v, str) and v.startswith("sglang.")}
    assert hooked == {target for target, _ in HOOKS}


def test_the_sampling_info_hook_sees_the_batch() -> None:
    """It is a classmethod; the hook finds the batch among the arguments by its ``reqs``."""
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    assert isinstance(vars(SamplingBatchInfo)["from_schedule_batch"], classmethod)
    assert not hasattr(SamplingBatchInfo, "reqs")
    assert "sampling_seed" in attributes(SamplingBatchInfo)


def test_the_sampler_draws_by_the_name_that_is_hooked() -> None:
    from sglang.srt.layers import sampler

    source = inspect.getsource(sampler.top_k_top_p_min_p_sampling_from_probs_torch)
    assert "multinomial_with_seed(logprobs, sampling_seed, positions)" in source


@pytest.mark.parametrize("name", OVERRIDES)
def test_overrides_override(name: str) -> None:
    module, upstream, methods = OVERRIDES[name]
    ours, theirs = getattr(importlib.import_module(module), name), resolve(upstream)
    assert issubclass(ours, theirs)
    for method in methods:
        assert hasattr(theirs, method), f"{upstream} has no {method} any more"
        assert method in vars(ours)
    known_to_upstream = {
        n for n in vars(ours)
        if hasattr(theirs, n) and not (n.startswith("__") and n != "__init__")
        and n not in {"_abc_impl"}
    }  # fmt: skip
    assert known_to_upstream == set(methods), "the table of overrides is not complete"


@pytest.mark.parametrize("name", OVERRIDES)
def test_overrides_take_what_upstream_passes(name: str) -> None:
    module, upstream, methods = OVERRIDES[name]
    ours, theirs = getattr(importlib.import_module(module), name), resolve(upstream)
    for method in methods:
        mine, original = getattr(ours, method), getattr(theirs, method)
        if method == "__init__" or not inspect.isfunction(inspect.unwrap(original)):
            continue
        own = inspect.signature(mine).parameters
        if any(p.kind is p.VAR_KEYWORD for p in own.values()):
            continue
        for parameter in inspect.signature(original).parameters.values():
            if parameter.default is parameter.empty and parameter.kind not in (
                parameter.VAR_KEYWORD,
                parameter.VAR_POSITIONAL,
            ):
                assert parameter.name in own, f"{name}.{method} lacks {parameter.name}"
        order = [p for p in inspect.signature(original).parameters if p in own]
        assert list(own) == order, f"{name}.{method}"


def test_every_subclass_of_upstream_is_in_the_table() -> None:
    upstream_names = {name for _, _, name in imports()}
    aliases = {
        alias.asname or alias.name
        for _, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sglang"
        for alias in node.names
    } | upstream_names
    bases = {
        node.name: {b.id for b in node.bases if isinstance(b, ast.Name)}
        for _, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found: set[str] = set()
    while more := {name for name in bases if bases[name] & (aliases | found)} - found:
        found |= more  # subclasses of our subclasses, too
    assert found == set(OVERRIDES)


@pytest.mark.parametrize("file,expression,attribute", UPSTREAM_ACCESSES)
def test_every_attribute_of_upstreams_objects_exists(
    file: str, expression: str, attribute: str
) -> None:
    if attribute in OURS.get(expression, ()):
        return
    if expression in BAGS:
        assert attribute in declared_in(BAGS[expression])
        return
    for path in HOLDS[expression]:
        if module := SET_ELSEWHERE.get((path, attribute)):
            source = inspect.getsource(importlib.import_module(f"{SRT}.{module}"))
            assert f'getattr(req, "{attribute}"' in source
            return
    classes = [resolve(path) for path in HOLDS[expression]]
    if expression in {"scheduler", "self._scheduler"}:
        from sglang_ares.srt.managers.scheduler import AresScheduler

        own = stored_on_self(ast.parse(textwrap.dedent(inspect.getsource(AresScheduler))))
        if attribute in vars(AresScheduler) or attribute in own:
            return
    assert any(attribute in attributes(cls) or hasattr(cls, attribute) for cls in classes), (
        f"{' / '.join(c.__name__ for c in classes)} has no {attribute!r}, "
        f"which {file} uses as {expression}.{attribute}"
    )


def test_no_access_escapes_the_table() -> None:
    roots = {e.split(".")[0].split("(")[0] for e in HOLDS} - {
        "self",
        "r",
        "w",
        "front",
        "params",
        "landing",
        "waiting",
    }
    unknown = set()
    for file, expression, attribute in accesses():
        root = expression.split(".")[0].split("(")[0].split("[")[0]
        if root in roots and expression not in HOLDS and expression not in NOT_UPSTREAMS:
            unknown.add((file, expression, attribute))
    assert not unknown


@pytest.mark.parametrize("name", ["AresScheduler", "AresController", "AresDetokenizerManager"])
def test_attributes_of_self_are_ours_or_upstreams(name: str) -> None:
    module, upstream, _ = OVERRIDES[name]
    cls = getattr(importlib.import_module(module), name)
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    on_self = [
        n for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "self"
    ]  # fmt: skip
    own = stored_on_self(tree) | set(vars(cls)) | set(cls.__annotations__)
    missing = {n.attr for n in on_self} - own - attributes(resolve(upstream))
    assert not missing, f"{name} uses {sorted(missing)}, which nobody sets"


def test_what_the_controller_sets_in_upstreams_place_is_still_read() -> None:
    """``launch_dp_schedulers`` is replaced: what upstream's sets and others read, ours must."""
    from sglang.srt.managers.data_parallel_controller import DataParallelController

    names = attributes(DataParallelController)
    for name in ("workers", "status", "dp_active", "scheduler_procs", "max_total_num_tokens",
                 "max_req_input_len", "startup_time", "dispatching", "_request_dispatcher",
                 "recv_from_tokenizer", "soft_watchdog", "context"):  # fmt: skip
        assert name in names, name


# --- names in strings -----------------------------------------------------------------------


@pytest.mark.parametrize("name", request_state._PLAIN_ATTRIBUTES)
def test_moved_attributes_exist(name: str) -> None:
    assert name in attributes(resolve(REQ))


@pytest.mark.parametrize("name", request_state._LOGPROB_ATTRIBUTES)
def test_moved_logprobs_exist(name: str) -> None:
    assert name in attributes(resolve("managers.schedule_batch.ReqLogprob"))


@pytest.mark.parametrize("name", CPU_DEFAULTS)
def test_cpu_defaults_are_fields_of_the_server_args(name: str) -> None:
    from sglang.srt.arg_groups.arg_utils import record_fields
    from sglang.srt.server_args import ServerArgs

    assert name in {f.name for f in record_fields(ServerArgs)}


@pytest.mark.parametrize("table", ["CLUSTER", "MODEL", "REQUEST"])
def test_refusals_read_fields_that_exist(table: str) -> None:
    from sglang_ares.srt.disaggregation import refusals

    classes = {
        "CLUSTER": [resolve("server_args.ServerArgs")],
        "MODEL": [resolve(SCHEDULER), resolve("configs.model_config.ModelConfig")],
        "REQUEST": [
            resolve("managers.io_struct.TokenizedGenerateReqInput"),
            resolve("sampling.sampling_params.SamplingParams"),
        ],
    }[table]
    names = {n for row in getattr(refusals, table) for n in row.applies.__code__.co_names}
    names -= {"bool"}
    assert names
    for name in names:
        assert any(name in attributes(cls) for cls in classes), name


def test_penalizers_by_name() -> None:
    """``_seed_row`` tells them apart by class name."""
    from sglang.srt.sampling import penaltylib

    source = inspect.getsource(penalties._seed_row)
    names = {
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and str(node.value).startswith("Batched")
    }
    assert len(names) == 4
    assert all(hasattr(penaltylib, name) for name in names)


# --- behaviour that a signature does not show -----------------------------------------------


def test_order_of_the_poll_states() -> None:
    """``poll_and_all_reduce`` takes the least over ranks: failure must win, success be last."""
    from sglang.srt.disaggregation.base.conn import KVPoll

    states = [KVPoll.Failed, KVPoll.Bootstrapping, KVPoll.WaitingForInput, KVPoll.Transferring,
              KVPoll.Success]  # fmt: skip
    assert states == sorted(states) and len(set(states)) == 5


def test_nixl_counts_the_chunks_under_way() -> None:
    from sglang.srt.disaggregation.nixl.conn import NixlKVManager

    source = inspect.getsource(NixlKVManager)
    assert "self._staging_outstanding = defaultdict(int)" in source
    assert "self._staging_outstanding[room] += 1" in source
    assert "self._staging_outstanding[room] -= 1" in source


def test_the_last_chunk_is_found_by_the_number_announced_last() -> None:
    """The total is announced twice: a bound before the copy, the real number at the end."""
    from sglang.srt.disaggregation.nixl.conn import NixlKVSender

    sender = object.__new__(NixlKVSender)
    sender.kv_mgr = SimpleNamespace(enable_all_cp_ranks_for_transfer=False, is_dummy_cp_rank=False)
    sender.curr_idx = 0
    pages = np.arange(3, dtype=np.int32)
    sender.init(10, 1)
    assert sender._prepare_send_indices(pages)[2] is False
    assert sender.curr_idx == 3
    sender.init(sender.curr_idx + 3, 1)
    _, index_slice, is_last, _ = sender._prepare_send_indices(pages)
    assert is_last and index_slice == slice(3, 6)


def test_upstream_builds_a_request_with_output_as_a_resumed_one() -> None:
    """``reserve`` relies on this flag to size the allocation by prompt and output."""
    from sglang.srt.disaggregation.decode import DecodePreallocQueue

    source = inspect.getsource(inspect.getmodule(DecodePreallocQueue))
    assert "pd_rebootstrap_in_progress" in source


def test_upstream_takes_recomputed_kv_for_a_request_with_output() -> None:
    """``rewind`` and ``ResumedRequests`` rely on upstream's rebootstrap: the prefill worker is
    asked for the KV in one place, the last output token is put back, not sampled, and its
    log-probability is not committed a second time."""
    from sglang.srt.disaggregation import decode

    publish = inspect.getsource(decode.DecodePreallocQueue)
    assert publish.count("self.kv_manager.submit_prefill_recompute(") == 1
    commit = inspect.getsource(decode.DecodeTransferQueue)
    assert "committed_output_id = decode_req.req.pd_rebootstrap_forced_output_id" in commit
    assert "if not replayed_boundary:" in commit


def test_upstream_still_names_failed_transfers_so() -> None:
    """A request is attempted again if its error begins like one of these."""
    from sglang.srt.disaggregation import decode, prefill

    from sglang_ares.srt.managers.output_streamer import KV_FAILURES

    source = inspect.getsource(decode) + inspect.getsource(prefill)
    for beginning in KV_FAILURES:
        assert f'"{beginning}' in source, beginning


def test_upstreams_detokenizer_loop_does_what_ours_repeats() -> None:
    """``event_loop`` is replaced; this is all that upstream's does."""
    from sglang.srt.managers.detokenizer_manager import DetokenizerManager

    source = inspect.getsource(DetokenizerManager.event_loop)
    body = [line.strip() for line in source.splitlines()[2:] if line.strip()]
    assert body == [
        "while True:",
        "with self.soft_watchdog.disable():",
        "recv_obj = sock_recv(self.recv_from_scheduler)",
        "output = self._request_dispatcher(recv_obj)",
        "if output is not None:",
        "sock_send(self.send_to_tokenizer, output)",
        "self.soft_watchdog.feed()",
    ]
