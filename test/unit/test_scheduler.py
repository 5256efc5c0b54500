"""What a worker's scheduler does in upstream's place, on stand-ins for the parts it works on."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable
from functools import partial
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from llguidance import LLTokenizer
from sglang.srt.constrained.base_grammar_backend import BaseGrammarObject
from sglang.srt.constrained.llguidance_backend import GuidanceGrammar
from sglang.srt.constrained.outlines_backend import OutlinesGrammar
from sglang.srt.disaggregation.decode_schedule_batch_mixin import (
    ScheduleBatchDisaggregationDecodeMixin,
)
from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import SchedulePolicy
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_ares.srt.disaggregation.request_state import capture, pack_ids, restore, rewind
from sglang_ares.srt.disaggregation.target import TargetMigration
from sglang_ares.srt.managers.migration_host import SchedulerMigrationHost
from sglang_ares.srt.managers.scheduler import AresScheduler


def new_req(**fields: Any) -> Req:
    params = SamplingParams(max_new_tokens=50)
    params.normalize(None)
    return Req("r#00", "", array("q", [1, 2, 3]), params, **fields)


def scheduler_with(**parts: Any) -> Any:
    """A scheduler that was never constructed; a test gives it what it needs."""
    scheduler = object.__new__(AresScheduler)
    vars(scheduler).update(parts)
    return scheduler


# --- requests that do not come through upstream's queue -------------------------------------


@pytest.mark.parametrize("taken", ["for a migration", "to go on from its output"])
@pytest.mark.parametrize("low_first", [False, True])
def test_a_request_without_a_priority_has_the_least_wherever_it_is_queued(
    taken: str, low_first: bool
) -> None:
    moves = taken == "for a migration"
    scheduler = scheduler_with(
        enable_priority_scheduling=True,
        schedule_low_priority_values_first=low_first,
        intake=SimpleNamespace(now=0.0),
        migrations=SimpleNamespace(take_built=lambda req, now: moves),
        resumed=SimpleNamespace(take_built=lambda req: True),
    )
    plain, urgent = new_req(), new_req(priority=5)
    for req in (plain, urgent):
        scheduler._add_request_to_queue(req)
    assert plain.priority == (sys.maxsize if low_first else -sys.maxsize - 1)
    assert urgent.priority == 5
    waiting = [plain, urgent]
    SchedulePolicy._sort_by_priority_and_fcfs(waiting, 1 if low_first else -1)
    assert waiting == [urgent, plain]


def test_without_priority_scheduling_a_priority_is_no_reason_to_refuse_a_moved_request() -> None:
    """Upstream would answer the client with an error, while the request decodes elsewhere."""
    scheduler = scheduler_with(
        enable_priority_scheduling=False,
        abort_on_priority_when_disabled=True,
        intake=SimpleNamespace(now=0.0),
        migrations=SimpleNamespace(take_built=lambda req, now: True),
    )
    req = new_req(priority=5)
    scheduler._add_request_to_queue(req)
    assert req.priority == 5 and req.to_finish is None


# --- LoRA adapters --------------------------------------------------------------------------


def offer_of(lora_id: str | None) -> Any:
    return SimpleNamespace(spec=SimpleNamespace(rid="new#00", lora_id=lora_id))


def decoding(**where: str | None) -> AresScheduler:
    """A decode worker whose batches hold two adapters. ``where``: what needs which."""
    reqs = {place: [SimpleNamespace(lora_id=lora_id)] for place, lora_id in where.items()}
    adapters = object.__new__(LoRAManager)
    adapters.max_loras_per_batch, adapters.num_pinned_loras = 2, 0
    adapters.lora_refs = dict.fromkeys("abc")
    inbound = object.__new__(TargetMigration)
    inbound._offer = offer_of(where.get("inbound"))
    scheduler: AresScheduler = scheduler_with(
        ares=SimpleNamespace(role="decode", received={}),
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(lora_manager=adapters)),
        lora_drainer=None,
        enable_lora_overlap_loading=False,
        _engine_paused=False,
        max_running_requests=100,
        running_batch=SimpleNamespace(reqs=reqs.get("running", [])),
        waiting_queue=reqs.get("waiting", []),
        disagg_decode_transfer_queue=SimpleNamespace(
            queue=[SimpleNamespace(req=req) for req in reqs.get("transferring", [])]
        ),
        disagg_decode_prealloc_queue=SimpleNamespace(retracted_queue=[]),
        migrations=SimpleNamespace(
            inbound={1: inbound} if "inbound" in where else {},
            stopped_requests=lambda: reqs.get("stopped", []),
        ),
    )
    return scheduler


def refusal(scheduler: AresScheduler, lora_id: str | None) -> str | None:
    host = object.__new__(SchedulerMigrationHost)
    host._scheduler = scheduler
    host._limits = SimpleNamespace(max_inbound=8)  # type: ignore[assignment]
    return host.refusal(offer_of(lora_id))


PLACES = ["running", "waiting", "transferring", "inbound", "stopped"]


@pytest.mark.parametrize("one,other", list(combinations(PLACES, 2)))
def test_a_move_is_refused_if_its_adapter_were_one_too_many_for_a_batch(
    one: str, other: str
) -> None:
    """Upstream's forward ends the worker over a batch with too many."""
    scheduler = decoding(**{one: "a", other: "b"})
    for lora_id in ("c", None):
        assert refusal(scheduler, lora_id) == "no room for the LoRA adapter in a batch"
    assert refusal(scheduler, "a") is refusal(scheduler, "b") is None


def test_the_model_alone_takes_the_place_of_an_adapter() -> None:
    scheduler = decoding(running=None, inbound="a")
    assert refusal(scheduler, "b") == "no room for the LoRA adapter in a batch"
    assert refusal(scheduler, "a") is refusal(scheduler, None) is None


def test_a_move_is_not_refused_where_there_are_no_adapters() -> None:
    scheduler = decoding(running=None)
    scheduler.tp_worker.model_runner.lora_manager = None
    assert refusal(scheduler, None) is None
    assert refusal(scheduler, "a") == "the LoRA adapter is not loaded here"


@pytest.mark.parametrize("place", ["inbound", "stopped"])
def test_new_requests_leave_room_for_the_adapters_of_those_that_move(place: str) -> None:
    scheduler = decoding(**{place: "a"})

    def fits(lora_id: str | None) -> bool:
        return scheduler.can_schedule_lora_req(new_req(lora_id=lora_id), {"b"})

    assert not fits("c") and not fits(None)
    assert fits("a") and fits("b")


def test_a_prefill_worker_counts_as_upstream_does() -> None:
    scheduler = decoding()
    scheduler.migrations = None
    assert scheduler.can_schedule_lora_req(new_req(lora_id="a"), {"b"})


# --- grammars -------------------------------------------------------------------------------


class Guide:
    """What ``OutlinesGrammar`` asks of a guide, for the pattern ``ab*c``."""

    def get_next_state(self, state: int, token: int) -> int:
        return {(0, ord("a")): 1, (1, ord("b")): 1, (1, ord("c")): 2}.get((state, token), -1)


def may_follow(grammar: GuidanceGrammar) -> list[int]:
    mask = grammar.allocate_vocab_mask(0, 1, "cpu")
    grammar.fill_vocab_mask(mask, 0)
    return mask.tolist()


# How to make the grammar, an answer that follows it (a token a byte), what its position is.
Grammar = tuple[Callable[[], BaseGrammarObject], bytes, Callable[[Any], Any]]
GRAMMARS: dict[str, Grammar] = {
    "llguidance": (
        lambda: GuidanceGrammar(LLTokenizer("byte"), '%llguidance {}\nstart: /"x":\\[[0-9,]+\\]/'),
        b'"x":[12,3]',
        may_follow,
    ),
    "outlines": (lambda: OutlinesGrammar(Guide(), None), b"abbc", lambda g: g.state),
}


def moves(req: Req, arrived: Req) -> Req:
    restore(arrived, capture(req))
    return arrived


def is_resumed(req: Req, arrived: Req) -> Req:
    rewind(arrived, pack_ids(req.output_ids))
    arrived.output_ids.append(arrived.pd_rebootstrap_forced_output_id)
    return arrived


def comes_back(req: Req, arrived: Req) -> Req:
    return req


def enter(req: Req) -> None:
    """The scheduler makes a batch of what has its KV here."""
    batch: Any = SimpleNamespace(
        reqs=[req],
        tree_cache=None,
        device="cpu",
        req_pool_indices=torch.tensor([0]),
        spec_algorithm=SimpleNamespace(build_disagg_draft_input=lambda *_: None),
        is_empty=lambda: False,
    )
    batch.process_prebuilt = partial(ScheduleBatchDisaggregationDecodeMixin.process_prebuilt, batch)
    scheduler = scheduler_with(
        _get_new_prebuilt_batch=lambda running_batch: batch,
        kv_checksum_computer=None,
        chunked_req=None,
        ngram_embedding_manager=SimpleNamespace(prepare_for_forward=lambda *_, **__: None),
        future_map=SimpleNamespace(stash=lambda *_: None),
    )
    assert scheduler.get_new_prebuilt_batch(None) is batch


@pytest.mark.parametrize("how", [moves, is_resumed, comes_back])
@pytest.mark.parametrize("kind", GRAMMARS)
def test_a_grammar_sees_every_token_once(
    kind: str, how: Callable[[Req, Req], Req], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``comes_back``: its move is cancelled after it stopped, or upstream retracts it."""
    make, answer, position = GRAMMARS[kind]
    for length in range(1, len(answer)):
        req, arrived, unbroken = new_req(), new_req(), make()
        for r in (req, arrived):
            r.grammar = make()
            r.skip_radix_cache_insert = True  # there is no cache here
        req.output_ids.append(answer[0])  # the prefill worker's: only the batch feeds it
        enter(req)
        for token in answer[1:length]:
            req.output_ids.append(token)
            req.grammar.accept_token(token)
        for token in answer[:length]:
            unbroken.accept_token(token)
        entered = how(req, arrived)
        enter(entered)
        assert entered.to_finish is None, answer[:length]
        assert position(entered.grammar) == position(unbroken), answer[:length]
