"""Messages that decode and cannot be true: none is acted on, none costs memory or a request."""

from __future__ import annotations

import ast
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.sampling.sampling_params import SamplingParams

import sglang_ares
from sglang_ares.srt.disaggregation.checks import (
    WorkerFacts,
    commit_fault,
    offer_fault,
    peers_fault,
    sampling_fault,
)
from sglang_ares.srt.disaggregation.request_state import (
    LogprobState,
    PlainState,
    RequestSpec,
    RequestState,
    pack_ids,
    spec_of,
    tokenized_input,
)
from sglang_ares.srt.managers import io_struct
from sglang_ares.srt.managers.cluster_state import ClusterState
from sglang_ares.srt.managers.cluster_views import MANUAL, MovingRequest, WorkerView
from sglang_ares.srt.managers.io_struct import (
    Accept,
    Cancel,
    Cancelled,
    ChunkSent,
    Commit,
    Committed,
    Decoder,
    ForwardAbort,
    Landed,
    Message,
    MigrationResult,
    Offer,
    Peer,
    Refuse,
    StartMigration,
    TransferFailed,
    WorkerInbound,
    encode,
)
from unit.message_values import random_message
from unit.migration_world import StrictlyDropped, World

FACTS = WorkerFacts(vocab_size=100, max_tokens=50)
replace = msgspec.structs.replace


def sampling(**changes: Any) -> SamplingParams:
    params = SamplingParams(max_new_tokens=20)
    params.normalize(None)
    for name, value in changes.items():
        setattr(params, name, value)
    return params


SPEC = RequestSpec(
    rid="r",
    http_worker_ipc=None,
    input_text=None,
    input_ids=pack_ids([1, 2, 3, 4, 5]),
    sampling_params=sampling(),
    return_logprob=True,
    logprob_start_len=-1,
    top_logprobs_num=1,
    token_ids_logprob=[7],
    stream=True,
    return_flat_raw_top_logprobs=False,
    lora_id=None,
    routing_key=None,
    require_reasoning=False,
    priority=None,
    extra_key=None,
    cache_salt=None,
    no_logs=False,
)
OFFER = Offer(
    migration_id=1,
    source=0,
    room=5,
    tokens=7,
    headroom=8,
    spec=SPEC,
    output_ids=pack_ids([6, 7, 8]),
)
PLAIN = PlainState(
    surr_offset=1,
    read_offset=5,
    decoded_text="",
    send_token_offset=4,
    send_decode_id_offset=8,
    send_output_token_logprobs_offset=4,
    cached_tokens=0,
    cached_tokens_device=0,
    cached_tokens_host=0,
    cached_tokens_storage=0,
    reasoning_tokens=0,
    retraction_count=0,
    retracted_stain=False,
    _is_reasoning_over=False,
    _think_end_match_len=0,
)
LOGPROBS = LogprobState(
    output_token_logprobs_val=[-0.1] * 4,
    output_token_logprobs_idx=[6, 7, 8, 9],
    output_top_logprobs_val=[[-0.1]] * 4,
    output_top_logprobs_idx=[[6], [7], [8], [9]],
    output_token_ids_logprobs_val=[[-2.0]] * 4,
    output_token_ids_logprobs_idx=[[7]] * 4,
)
STATE = RequestState(
    output_ids=pack_ids([6, 7, 8, 9]), plain=PLAIN, detokenized=4, logprobs=LOGPROBS
)
COMMIT = Commit(migration_id=1, source=0, tokens=8, state=STATE, stopped_at=1.0)


def test_an_offer_says_how_long_the_source_lets_the_request_become() -> None:
    request = tokenized_input(
        replace(SPEC, sampling_params=sampling(max_new_tokens=None)),
        bootstrap_host="",
        bootstrap_port=0,
        bootstrap_room=0,
    )
    assert offer_fault(replace(OFFER, spec=spec_of(request)), FACTS) is not None
    assert offer_fault(replace(OFFER, spec=spec_of(request, 30)), FACTS) is None
    assert spec_of(request, 30).sampling_params.max_new_tokens == 30
    assert request.sampling_params.max_new_tokens is None


def test_a_true_offer_and_commit_pass() -> None:
    assert offer_fault(OFFER, FACTS) is None
    assert offer_fault(replace(OFFER, tokens=8), FACTS) is None, "one ahead: overlap scheduling"
    assert commit_fault(COMMIT, OFFER, FACTS) is None
    without = replace(SPEC, return_logprob=False)
    none = LogprobState(**dict.fromkeys(LogprobState.__struct_fields__))
    state = replace(STATE, logprobs=none, plain=replace(PLAIN, surr_offset=None, read_offset=None))
    assert commit_fault(replace(COMMIT, state=state), replace(OFFER, spec=without), FACTS) is None


SPEC_FAULTS: dict[str, dict[str, Any]] = {
    "half a token": {"input_ids": b"\x01\x00\x00\x00\x02"},
    "no prompt": {"input_ids": b""},
    "outside the vocabulary": {"input_ids": pack_ids([1, 2, 3, 4, 100])},
    "negative token": {"input_ids": pack_ids([1, 2, 3, 4, -1])},
    "an ipc name": {"http_worker_ipc": "tcp://10.0.0.1:1"},
    "logprob start": {"logprob_start_len": 6},
    "negative logprob start": {"logprob_start_len": -2},
    "top logprobs": {"top_logprobs_num": 101},
    "token ids logprob": {"token_ids_logprob": [1, 100]},
    "priority": {"priority": 2**40},
}


@pytest.mark.parametrize("fault", SPEC_FAULTS)
def test_a_request_that_cannot_be(fault: str) -> None:
    spec = replace(SPEC, **SPEC_FAULTS[fault])
    assert offer_fault(replace(OFFER, spec=spec), FACTS)


OFFER_FAULTS: dict[str, dict[str, Any]] = {
    "too few tokens": {"tokens": 6},
    "too many tokens": {"tokens": 9},
    "no room for the headroom": {"headroom": 44},
    "no output": {"output_ids": b"", "tokens": 4},
    "half a token": {"output_ids": b"\x01\x00\x00"},
    "token outside": {"output_ids": pack_ids([6, 7, 2**31 - 1])},
}


@pytest.mark.parametrize("fault", OFFER_FAULTS)
def test_an_offer_that_cannot_be(fault: str) -> None:
    assert offer_fault(replace(OFFER, **OFFER_FAULTS[fault]), FACTS)


SAMPLING_FAULTS: dict[str, dict[str, Any]] = {
    "not normalised": {"is_normalized": False},
    "a stop that was not normalised": {"stop": ["x"]},
    "temperature 0": {"temperature": 0.0},
    "temperature nan": {"temperature": float("nan")},
    "temperature negative": {"temperature": -1.0},
    "top_p": {"top_p": 0.0},
    "top_k": {"top_k": 0},
    "penalty": {"frequency_penalty": float("inf")},
    "repetition": {"repetition_penalty": 0.0},
    "no limit": {"max_new_tokens": None},
    "negative limit": {"max_new_tokens": -1},
    "beam": {"beam_width": 4},
    "stream interval": {"stream_interval": 0},
    "stops not a list": {"stop_strs": "abc"},
    "too many stops": {"stop_strs": ["x"] * 33},
    "stop length": {"stop_str_max_len": -1},
    "regexes not a list": {"stop_regex_strs": None},
    "not a regex": {"stop_regex_strs": ["("]},
    "too long a regex": {"stop_regex_strs": ["x" * 257]},
    "bias on no token": {"logit_bias": {"x": 1.0}},
    "bias outside": {"logit_bias": {"100": 1.0}},
    "bias nan": {"logit_bias": {"1": float("nan")}},
    "two grammars": {"regex": "a", "ebnf": "b"},
    "seed": {"sampling_seed": 2**63},
}


@pytest.mark.parametrize("fault", SAMPLING_FAULTS)
def test_sampling_parameters_that_cannot_be(fault: str) -> None:
    assert sampling_fault(sampling(), 100) is None
    assert sampling_fault(sampling(**SAMPLING_FAULTS[fault]), 100)


STATE_FAULTS: dict[str, Callable[[RequestState], RequestState]] = {
    "another output": lambda s: replace(s, output_ids=pack_ids([6, 7, 9, 9])),
    "less output": lambda s: replace(s, output_ids=pack_ids([6, 7])),
    "token outside": lambda s: replace(s, output_ids=pack_ids([6, 7, 8, 100])),
    "no output": lambda s: replace(s, output_ids=b""),
    "half a token": lambda s: replace(s, output_ids=s.output_ids + b"\x00"),
    "detokenized": lambda s: replace(s, detokenized=5),
    **{
        f"plain {name} {value}": lambda s, name=name, value=value: replace(  # type: ignore[misc]
            s, plain=replace(s.plain, **{name: value})
        )
        for name, value in {
            "surr_offset": 6,
            "read_offset": 10,
            "send_token_offset": 5,
            "send_decode_id_offset": 10,
            "send_output_token_logprobs_offset": 5,
            "reasoning_tokens": 5,
        }.items()
    },
    "surr without read": lambda s: replace(s, plain=replace(s.plain, read_offset=None)),
    **{
        f"logprobs {name}": lambda s, name=name, value=value: replace(  # type: ignore[misc]
            s, logprobs=replace(s.logprobs, **{name: value})
        )
        for name, value in {
            "output_token_logprobs_val": [-0.1] * 3,
            "output_token_logprobs_idx": [6, 7, 8, 100],
            "output_top_logprobs_val": [[-0.1, -0.2]] * 4,
            "output_top_logprobs_idx": None,
            "output_token_ids_logprobs_idx": [[100]] * 4,
        }.items()
    },
    "no logprobs": lambda s: replace(
        s, logprobs=LogprobState(**dict.fromkeys(LogprobState.__struct_fields__))
    ),
}


@pytest.mark.parametrize("fault", STATE_FAULTS)
def test_a_state_that_cannot_be(fault: str) -> None:
    assert commit_fault(replace(COMMIT, state=STATE_FAULTS[fault](STATE)), OFFER, FACTS)


@pytest.mark.parametrize("tokens", [7, 9])
def test_tokens_that_do_not_fit_the_state(tokens: int) -> None:
    assert commit_fault(replace(COMMIT, tokens=tokens), OFFER, FACTS)


def test_an_output_beyond_the_reserved_memory() -> None:
    output = pack_ids([6, 7, 8, *[9] * 9])
    none = LogprobState(**dict.fromkeys(LogprobState.__struct_fields__))
    state = replace(STATE, output_ids=output, logprobs=none)
    offer = replace(OFFER, spec=replace(SPEC, return_logprob=False))
    assert commit_fault(replace(COMMIT, state=state, tokens=16), offer, FACTS)
    state = replace(state, output_ids=output[:-4])
    assert commit_fault(replace(COMMIT, state=state, tokens=15), offer, FACTS) is None


def test_logprobs_that_were_not_asked_for() -> None:
    offer = replace(OFFER, spec=replace(SPEC, return_logprob=False))
    assert commit_fault(COMMIT, offer, FACTS)


def peer(worker_id: int, role: str = "decode", endpoint: str = "ipc:///x") -> Peer:
    return Peer(
        worker_id=worker_id,
        role=role,
        control_endpoint=endpoint,
        bootstrap_host="h",
        bootstrap_port=1,
    )


def test_lists_of_peers() -> None:
    assert peers_fault([peer(0), peer(1)], 1) is None
    assert peers_fault([peer(0), peer(0)], 0)
    assert peers_fault([peer(0)], 1)
    assert peers_fault([peer(1), peer(2, endpoint="inproc://x")], 1)


# --- messages out of place ------------------------------------------------------------------


def moving_world() -> tuple[World, int]:
    """A migration of ``r`` from 0 to 1 that has been accepted."""
    world = World(workers=3)
    world.submit("r", max_new=200)
    migration_id = world.start("r", 0, 1)
    return world, migration_id


def finish(world: World) -> None:
    world.settle()
    world.check_quiet()
    world.run_out()


OUT_OF_PLACE: dict[str, tuple[int, Callable[[int], Message]]] = {
    "accept of another worker": (0, lambda i: Accept(migration_id=i, worker_id=2, prefix_tokens=0)),
    "refusal of another worker": (0, lambda i: Refuse(migration_id=i, worker_id=2, reason="no")),
    "commitment of another worker": (0, lambda i: Committed(migration_id=i, worker_id=2)),
    "let go by another worker": (0, lambda i: Cancelled(migration_id=i, worker_id=2)),
    "failure on another worker": (
        0,
        lambda i: TransferFailed(migration_id=i, worker_id=2, reason="x"),
    ),
    "an unknown worker": (0, lambda i: Accept(migration_id=i, worker_id=77, prefix_tokens=0)),
    "more prefix than tokens": (
        0,
        lambda i: Accept(migration_id=i, worker_id=1, prefix_tokens=1000),
    ),
    "chunk of another worker": (1, lambda i: ChunkSent(migration_id=i, source=2)),
    "commit of another worker": (1, lambda i: replace(COMMIT, migration_id=i, source=2)),
    "cancel of another worker": (1, lambda i: Cancel(migration_id=i, source=2, reason="x")),
    "abort of another worker": (1, lambda i: ForwardAbort(migration_id=i, source=2)),
    "cancel of an unknown worker": (1, lambda i: Cancel(migration_id=i, source=77, reason="x")),
    "offer with the same id": (1, lambda i: replace(OFFER, migration_id=i, source=2)),
    "offer of oneself": (1, lambda i: replace(OFFER, migration_id=i + 1, source=1)),
    "offer of an unknown worker": (1, lambda i: replace(OFFER, migration_id=i + 1, source=77)),
    "repeated command": (0, lambda i: StartMigration(migration_id=i, rid="r", target=2)),
}


@pytest.mark.parametrize("what", OUT_OF_PLACE)
@pytest.mark.parametrize("when", [0, 1, 2, 3])
def test_a_message_out_of_place_changes_nothing(what: str, when: int) -> None:
    """At several moments of a migration, which completes all the same."""
    world, migration_id = moving_world()
    for _ in range(when):
        for link in world.links():
            world.deliver(*link)
        for transfer in list(world.transfers.values()):
            transfer.advance()
        for worker in world.workers:
            worker.iterate()
    receiver, make = OUT_OF_PLACE[what]
    if receiver == 1 and not world.workers[1].manager.inbound:
        world.deliver(0, 1)
    manager = world.workers[receiver].manager
    manager.receive(make(migration_id), world.now)
    assert world.workers[receiver].dropped.total == 1
    finish(world)
    assert world.result(migration_id).outcome == "completed"


def test_a_forged_offer_is_given_up_and_its_memory_freed() -> None:
    """Well-formed, but the named source knows nothing of it."""
    world = World()
    req = world.submit("r", max_new=100)
    forged = replace(
        OFFER,
        migration_id=99,
        room=3,
        tokens=5,
        spec=replace(SPEC, rid="forged", return_logprob=False),
        output_ids=pack_ids([0]),
    )
    sender = world.workers[0].link.open_sender(3)  # nobody drives it
    world.workers[1].manager.receive(forged, world.now)
    assert world.workers[1].manager.inbound and world.workers[1].memory.table
    sender.abort()
    for _ in range(20):
        world.round(dt=1.0)
    assert not world.workers[1].manager.inbound and not world.workers[1].memory.table
    assert len(world.workers[1].memory.free_slots) == world.workers[1].memory.slots
    assert req.rid == "r" and world.owner("r") == 0


def test_an_invalid_state_sends_the_request_back() -> None:
    world, migration_id = moving_world()
    decoder = Decoder(WorkerInbound)
    for _ in range(40):
        queue = world.network[0, 1]
        commit = next((m for m in map(decoder.decode, queue) if isinstance(m, Commit)), None)
        if commit is not None:
            queue.pop()
            state = replace(commit.state, output_ids=commit.state.output_ids + b"\x00")
            queue.append(encode(replace(commit, state=state)))
            break
        world.round()
        for link in [(1, 0)]:
            world.deliver(*link)
        if migration_id in world.workers[0].manager.outbound:
            world.workers[0].iterate()
    else:
        raise AssertionError("no commit")
    finish(world)
    result = world.result(migration_id)
    assert result.outcome == "failed" and result.reason.startswith("invalid state: output_ids")


@pytest.mark.parametrize("where", ["build", "reserve", "open_receiver"])
def test_an_error_while_taking_in_ends_the_migration_only(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The product survives what the tests' world raises on purpose."""
    world, migration_id = moving_world()
    target = world.workers[1]
    monkeypatch.setattr(
        StrictlyDropped, "count", lambda self, reason, *, error=None: None, raising=True
    )

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(target.link if where == "open_receiver" else target, where, fail)
    frame = world.network[0, 1].popleft()
    target.manager.receive(Decoder(WorkerInbound).decode(frame), world.now)
    finish(world)
    assert world.result(migration_id).outcome == "refused"
    assert not target.memory.table and len(target.memory.free_slots) == target.memory.slots


# --- anything at all ------------------------------------------------------------------------

WORKER_MESSAGES = [
    StartMigration, Offer, Accept, Refuse, ChunkSent, Commit, Committed, Cancel, Cancelled,
    TransferFailed, ForwardAbort,
]  # fmt: skip


@settings(max_examples=60)
@given(rng=st.randoms(use_true_random=False))
def test_any_messages_while_requests_move(rng: Any) -> None:
    """Arbitrary messages between those of real migrations: no error, every stream whole, no
    page leaked. (Only ids that really exist could make an order of a message; ids of the
    migrations under way are drawn too, with the wrong sender.)"""
    world = World(workers=3)
    for i in range(3):
        world.submit(f"r{i}", worker=i, max_new=60)
    for step in range(12):
        if step in (1, 5):
            world.start(f"r{rng.randrange(3)}", *rng.sample(range(3), 2))
        message = random_message(rng.choice(WORKER_MESSAGES), rng)
        receiver = rng.randrange(3)
        manager = world.workers[receiver].manager
        known = [*manager.outbound, *manager.inbound]
        changes: dict[str, Any] = {"migration_id": rng.choice([*known, 1000 + step])}
        for name in ("worker_id", "source"):
            if hasattr(message, name):
                changes[name] = receiver if rng.random() < 0.5 else 50
        if isinstance(message, StartMigration):
            changes["migration_id"] = 1000 + step
        message = replace(message, **changes)
        decoded = Decoder(WorkerInbound).decode(encode(message))
        manager.receive(decoded, world.now)  # this world lets errors through
        world.check()
        world.round()
    world.results = [r for r in world.results if r.migration_id < 1000]
    world.network = {k: deque(q) for k, q in world.network.items()}  # type: ignore[assignment]
    world.settle(rounds=200, dt=0.2)
    world.check_quiet()
    world.run_out()


# --- the controller -------------------------------------------------------------------------


def test_what_the_controller_does_not_believe() -> None:
    views = [
        WorkerView(worker_id=i, role=role, pids=[], kv_capacity=100)
        for i, role in enumerate(["prefill", "decode", "decode"])
    ]
    state = ClusterState(views)
    state.note_migration_started(1, MovingRequest("r", 1, 2, MANUAL))
    result = MigrationResult(
        migration_id=1, rid="r", source=1, target=2, outcome="completed", reason="", tokens=1,
        tokens_sent=1, tokens_saved=0, kv_bytes=1, duration_s=0.1,
    )  # fmt: skip
    assert state.fault(result) is None
    for changes in ({"migration_id": 2}, {"rid": "s"}, {"source": 2}, {"target": 99}):
        assert state.fault(replace(result, **changes))
    landed = Landed(migration_id=1, rid="r", worker_id=2, blackout_s=0.1, steps=1)
    assert state.fault(landed) is None
    for changes in ({"migration_id": 2}, {"migration_id": 0}, {"worker_id": 9}):
        assert state.fault(replace(landed, **changes))
    import random

    report = random_message(io_struct.WorkerReport, random.Random(1))
    load = replace(report.load, worker_id=1, role="decode")
    report = replace(report, worker_id=1, load=load)
    assert state.fault(report) is None
    assert state.fault(replace(report, worker_id=7))
    assert state.fault(replace(report, load=replace(load, worker_id=2)))
    assert state.fault(replace(report, load=replace(load, role="prefill")))


# --- nothing is unpickled -------------------------------------------------------------------

# Who unpickles, and why: what these read comes from upstream's own ipc sockets, in the runtime
# directory that only its owner may enter.
UNPICKLES = {
    ("srt/managers/batch_items.py", "unwrap_from_pickle"),
    ("srt/managers/detokenizer_manager.py", "sock_recv"),
    ("srt/managers/controller.py", "sock_recv"),
    # The processes of one host's cluster, over pipes inherited from their parent.
    ("srt/managers/cluster.py", "recv"),
    # The controller's arguments, handed by its parent as multiprocessing hands arguments; read
    # only after the workers' fork server has begun to import what reading them imports.
    ("engine.py", "pickle"),
    ("srt/managers/worker_process.py", "pickle"),
}
SUSPECTS = {
    "pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "jsonpickle",
    "recv_pyobj", "send_pyobj", "recv_serialized", "loads_pickle", "unwrap_from_pickle",
    "sock_recv", "broadcast_pyobj", "eval", "exec", "yaml_load", "unsafe_load",
}  # fmt: skip


def test_no_socket_of_ours_is_unpickled() -> None:
    package = Path(sglang_ares.__file__).parent
    found = set()
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name.split(".")[0] for a in node.names]
                if isinstance(node, ast.ImportFrom):
                    names.append((node.module or "").split(".")[0])
            elif isinstance(node, ast.Attribute):
                names = [node.attr] if node.attr != "eval" else []  # of a torch module
                if node.attr == "recv" and file == "srt/managers/cluster.py":
                    found.add((file, "recv"))
            elif isinstance(node, ast.Name):
                names = [node.id]
            found |= {(file, name) for name in names if name in SUSPECTS}
    assert found == UNPICKLES
