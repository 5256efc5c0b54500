"""Where the cluster's sockets lie: one private folder per server."""

from __future__ import annotations


def front_endpoint(runtime_dir: str) -> str:
    """Where the controller listens for the front."""
    return f"ipc://{runtime_dir}/front"


def controller_endpoint(runtime_dir: str) -> str:
    """Where the controller listens for workers and the token ledger."""
    return f"ipc://{runtime_dir}/controller"


def ledger_endpoint(runtime_dir: str) -> str:
    """Where the token ledger listens for the controller."""
    return f"ipc://{runtime_dir}/ledger"


def worker_endpoint(runtime_dir: str, worker_id: int, incarnation: int) -> str:
    """Where a worker listens for the controller and its peers."""
    return f"ipc://{runtime_dir}/worker-{worker_id}.{incarnation}"
