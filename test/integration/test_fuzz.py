"""Ten thousand hostile frames at every socket of a cluster that serves and moves requests."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from typing import Any

import msgspec
import pytest
import zmq
from sglang.srt.sampling.sampling_params import SamplingParams

from integration.moving import run_all
from integration.servers import Server
from sglang_ares.srt.disaggregation.request_state import pack_ids
from sglang_ares.srt.managers import io_struct
from sglang_ares.srt.managers.io_struct import Message, Offer, encode
from unit.message_values import random_message

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

FRAMES = 10_000
SEED = 20_261
LARGE_BYTES = 100 * 1024 * 1024
REQUESTS = 24
MESSAGES: list[type[Message]] = [
    c for c in vars(io_struct).values()
    if isinstance(c, type) and issubclass(c, Message) and c is not Message
]  # fmt: skip
# Changed in a byte or two these could still be orders or reports; whole ones of random content
# are sent too, but name nothing that exists.
NOT_MUTATED = {"ConnectPeers", "WorkerReport", "PeerDied", "DrainQuery"}
# Orders that would rightly be obeyed if they named a worker that exists.
NAME_NOBODY = (io_struct.PeerDied, io_struct.DrainQuery, io_struct.RoleQuery, io_struct.ChangeRole)


class Fuzzer(threading.Thread):
    """Sends frames round robin to the sockets, in bursts, until all are sent."""

    def __init__(self, endpoints: dict[str, str], decode_workers: list[int]) -> None:
        super().__init__(daemon=True)
        self._endpoints = endpoints
        self._decode_workers = decode_workers
        self._rng = random.Random(SEED)
        self.sent: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()

    def run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(1)
        sockets = {}
        for name, endpoint in self._endpoints.items():
            socket = context.socket(zmq.DEALER if name == "front" else zmq.PUSH)
            socket.setsockopt(zmq.LINGER, 2000)
            socket.setsockopt(zmq.SNDTIMEO, 20_000)
            socket.connect(endpoint)
            sockets[name] = socket
        names = list(sockets)
        for i in range(FRAMES):
            name = names[i % len(names)]
            kind = self._rng.choice(
                ["random", "truncated", "mutated", "mutated", "well-formed", "parts", "offer"]
            )
            sockets[name].send_multipart(self._parts(kind, name))
            self.sent[name] += 1
            self.kinds[kind] += 1
            if i % 100 == 0:
                time.sleep(0.05)
        for socket in sockets.values():
            socket.send(b"\xc6" + LARGE_BYTES.to_bytes(4, "big") + bytes(LARGE_BYTES))
        for socket in sockets.values():
            socket.close()
        context.term()

    def _parts(self, kind: str, name: str) -> list[bytes]:
        rng = self._rng
        if kind == "random":
            return [rng.randbytes(rng.randint(0, 200))]
        if kind == "parts":
            return [rng.randbytes(rng.randint(0, 9)) for _ in range(rng.randint(2, 5))]
        if kind == "offer":
            return [encode(self._offer(name))]
        cls = rng.choice(MESSAGES)
        message = random_message(cls, rng)
        if isinstance(message, NAME_NOBODY):
            message = msgspec.structs.replace(message, worker_id=rng.randrange(1000, 2**16))
        frame = bytearray(encode(message))
        if kind == "truncated" or (kind == "mutated" and cls.__name__ in NOT_MUTATED):
            del frame[rng.randrange(len(frame)) :]
        elif kind == "mutated":
            for _ in range(rng.randint(1, 4)):
                frame[rng.randrange(len(frame))] = rng.randrange(256)
        return [bytes(frame)]

    def _offer(self, name: str) -> Offer:
        """An offer that could be true, but for which nobody stands."""
        rng = self._rng
        offer: Offer = random_message(Offer, rng)
        replace = msgspec.structs.replace
        params = SamplingParams(max_new_tokens=100)
        params.normalize(None)
        spec = replace(
            offer.spec,
            sampling_params=params,
            http_worker_ipc=None,
            input_ids=pack_ids([rng.randrange(20) for _ in range(rng.randint(1, 300))]),
            logprob_start_len=-1,
            top_logprobs_num=0,
            token_ids_logprob=None,
            lora_id=None,
            priority=None,
        )
        output = pack_ids([rng.randrange(20) for _ in range(rng.randint(1, 50))])
        others = [w for w in self._decode_workers if name != f"worker-{w}"]
        return replace(
            offer,
            source=rng.choice(others),
            migration_id=rng.randint(10**6, 10**9),
            room=rng.getrandbits(61),
            spec=spec,
            output_ids=output,
            tokens=(len(spec.input_ids) + len(output)) // 4 - 1,
            headroom=rng.randint(0, 64),
        )


def bodies() -> dict[str, dict[str, Any]]:
    return {
        f"fuzz-{i}": {
            "text": f"walk {i % 7 + 3}\n",
            "sampling_params": {
                "max_new_tokens": 500,
                "temperature": 0 if i % 2 else 1.0,
                "sampling_seed": i,
                "ignore_eos": True,
            },
            "return_logprob": i % 4 == 0,
        }
        for i in range(REQUESTS)
    }


def dropped(status: dict[str, Any]) -> dict[str, int]:
    """What each receiver has dropped."""
    workers = {f"worker-{w['id']}": w["dropped_frames"] for w in status["workers"]}
    return {**status["dropped_frames"], **workers}


def test_ten_thousand_hostile_frames(server: Server) -> None:
    before = server.wait_until_idle()
    names = ["controller", "front", *(f"worker-{w['id']}" for w in before["workers"])]
    endpoints = {name: f"ipc://{before['runtime_dir']}/{name}" for name in names}
    reference, _ = asyncio.run(
        run_all(server.url, {f"{r}-ref": b for r, b in bodies().items()}, at_once=12)
    )

    fuzzer = Fuzzer(endpoints, server.decode_workers())
    fuzzer.start()
    answers, log = asyncio.run(
        run_all(server.url, bodies(), at_once=12, move_on=server.decode_workers(), moves_wanted=4)
    )
    fuzzer.join(120)
    assert not fuzzer.is_alive() and fuzzer.sent.total() == FRAMES
    assert set(fuzzer.sent) == set(names) and len(fuzzer.kinds) == 6

    for rid, answer in answers.items():
        assert answer["output_ids"] == reference[f"{rid}-ref"]["output_ids"], (
            rid,
            answer["meta_info"],
        )
        assert answer["text"] == reference[f"{rid}-ref"]["text"], rid
    assert log.outcomes["completed"] >= REQUESTS, (log.outcomes, log.reasons)

    after = server.wait_until_idle(60)
    assert [w["pids"] for w in after["workers"]] == [w["pids"] for w in before["workers"]]
    counts, counts_before = dropped(after), dropped(before)
    for name, sent in fuzzer.sent.items():
        # The rest is well-formed and meaningless, or a question, which is answered.
        assert counts[name] - counts_before[name] >= sent // 3, (name, counts, fuzzer.kinds)
    for worker in after["workers"]:
        pools = worker["pools"]
        assert pools["kv_free"] + pools["kv_cached"] == worker["kv_capacity"], worker
        assert pools["requests"] == 0, worker
        assert worker["migrations_in"] == worker["migrations_out"] == 0, worker
        if worker["role"] == "decode":
            assert pools["metadata_slots_free"] == 2 * pools["request_slots_free"], worker
    assert after["requests"] == 0 and after["migrations"]["in_flight"] == 0
    text = server.log.read_text()
    assert "could not be handled" not in text and "integrity check failed" not in text


def test_the_count_is_a_series(server: Server) -> None:
    import httpx

    metrics = httpx.get(f"{server.url}/metrics", timeout=30).text
    lines = [x for x in metrics.splitlines() if "sglang_ares:dropped_control_frames_total{" in x]
    assert {x.split('where="')[1].split('"')[0] for x in lines} >= {"controller", "worker-1"}
