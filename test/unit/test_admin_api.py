"""The ``/ares`` endpoints without a cluster: authorisation, bad bodies, a silent controller."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sglang.srt.utils.auth import add_api_key_middleware

from sglang_ares.srt.entrypoints.admin_api import add_ares_routes
from sglang_ares.srt.entrypoints.front_client import FrontClient
from sglang_ares.srt.entrypoints.leaving import RefuseWhileLeaving

ENDPOINTS = (
    ("GET", "/ares/status"),
    ("GET", "/ares/requests"),
    ("POST", "/ares/migrate"),
)
MOVE = {"rid": "a", "target": 1}


def client(folder: Path, **keys: str | None) -> TestClient:
    """An app like upstream's, whose controller never answers."""
    app = FastAPI()
    add_ares_routes(app, FrontClient(f"ipc://{folder}/nobody", timeout_s=0.05))
    add_api_key_middleware(
        app, api_key=keys.get("api_key"), admin_api_key=keys.get("admin_api_key")
    )
    return TestClient(app)


@pytest.mark.parametrize("method, path", ENDPOINTS)
def test_admin_key_is_honoured(tmp_path: Path, method: str, path: str) -> None:
    """With ``--admin-api-key`` only its bearer gets through; the API key is not enough."""
    app = client(tmp_path, api_key="user", admin_api_key="admin")
    for headers in ({}, {"Authorization": "Bearer user"}, {"Authorization": "Bearer wrong"}):
        assert app.request(method, path, headers=headers, json=MOVE).status_code == 401
    admin = {"Authorization": "Bearer admin"}
    assert app.request(method, path, headers=admin, json=MOVE).status_code == 504


@pytest.mark.parametrize("method, path", ENDPOINTS)
def test_a_silent_controller_is_a_gateway_timeout(tmp_path: Path, method: str, path: str) -> None:
    """504 and the reason, not a hang."""
    answer = client(tmp_path).request(method, path, json=MOVE)
    assert answer.status_code == 504
    assert "did not answer" in answer.json()["reason"]


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[1]", b'{"rid": 1, "target": 1}', b'{"rid": "a", "target": 1, "x": 2}']
)
def test_bad_bodies_are_400_and_say_what_was_expected(tmp_path: Path, body: bytes) -> None:
    """Types are checked, unknown fields are refused."""
    answer = client(tmp_path).post("/ares/migrate", content=body)
    assert answer.status_code == 400
    assert '"rid": string' in answer.json()["reason"]


@pytest.mark.parametrize("body", [b"", b'{"placement": 1}', b'{"policy": "none"}'])
def test_bad_policies_are_400(tmp_path: Path, body: bytes) -> None:
    answer = client(tmp_path).post("/ares/policy", content=body)
    assert answer.status_code == 400
    assert '"rescheduling": name' in answer.json()["reason"]


@pytest.mark.parametrize(
    "method, path, refused",
    [
        ("POST", "/generate", True),
        ("PUT", "/generate", True),
        ("GET", "/health", False),
        ("POST", "/ares/migrate", False),
    ],
)
def test_a_server_that_leaves_takes_nothing_new(method: str, path: str, refused: bool) -> None:
    """Upstream serves the same under POST and PUT."""
    leaving = False
    app = FastAPI()
    app.add_api_route(path, lambda: "served", methods=[method])
    app.add_middleware(RefuseWhileLeaving, is_leaving=lambda: leaving)
    assert TestClient(app).request(method, path).status_code == 200
    leaving = True
    assert TestClient(app).request(method, path).status_code == (503 if refused else 200)


@pytest.mark.parametrize("name", ["migrate", "policy", "drain", "undrain", "role", "fault"])
def test_bodies_that_are_not_utf8_are_400(tmp_path: Path, name: str) -> None:
    answer = client(tmp_path).post(f"/ares/{name}", content=b'{"\xff": 1}')
    assert answer.status_code == 400
    assert answer.json()["reason"].startswith("the body must be {")
