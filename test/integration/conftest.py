"""One cluster for all process-level tests: 1 prefill and 2 decode workers behind the server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from integration.servers import Server, start_server, stop_server


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--full``: the sizes that an acceptance asks for, where the usual ones are smaller."""
    parser.addoption("--full", action="store_true", help="long runs at their full size")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The shared cluster; tests move requests themselves, so no policy does."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    process, server = start_server(
        log,
        "--enable-metrics",
        "--ares-rescheduling=none",
        "--ares-report-interval=0.1",
        "--log-level=info",
    )
    try:
        yield server
        text = log.read_text()
        assert "integrity check failed" not in text, text
    finally:
        stop_server(process)
