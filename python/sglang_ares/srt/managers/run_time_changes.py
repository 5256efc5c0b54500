"""What control requests have changed in the workers since the server was started.

A worker that is started anew must come to be what the others are by now. LoRA adapters are loaded
and unloaded again, before it serves. New weights are not to be had again: where they came from may
be gone, so it is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Final

from sglang.srt.managers.io_struct import (
    LoadLoRAAdapterFromTensorsReqInput,
    LoadLoRAAdapterReqInput,
    UnloadLoRAAdapterReqInput,
    UpdateWeightFromDiskReqInput,
    UpdateWeightsFromDistributedReqInput,
    UpdateWeightsFromIPCReqInput,
    UpdateWeightsFromTensorReqInput,
)

logger = logging.getLogger(__name__)

# Tensors may lie in another process's memory, or be many.
_NOT_REPEATABLE: Final = (
    LoadLoRAAdapterFromTensorsReqInput,
    UpdateWeightFromDiskReqInput,
    UpdateWeightsFromDistributedReqInput,
    UpdateWeightsFromIPCReqInput,
    UpdateWeightsFromTensorReqInput,
)


class RunTimeChanges:
    """Of all workers, as the controller has sent them. Whether the workers could do what they were
    asked is between them and the front."""

    def __init__(self) -> None:
        # Requests to be repeated, in order.
        self.adapters: list[LoadLoRAAdapterReqInput | UnloadLoRAAdapterReqInput] = []
        # Why no worker can be started as the others are now.
        self.why_not_anew: str | None = None
        # Rises with every change.
        self.count = 0

    @property
    def why_not_join(self) -> str | None:
        """Why no worker of another host can be as those of this one: it is sent no adapters."""
        if self.why_not_anew is None and self.adapters:
            return "LoRA adapters were loaded or unloaded while the server ran"
        return self.why_not_anew

    def note(self, request: Any) -> None:
        """A control request is sent to all workers that serve."""
        if isinstance(request, _NOT_REPEATABLE):
            if self.why_not_anew is None:
                logger.warning(
                    "%s changes the workers' weights: from now on a worker that dies is left out, "
                    "and none can join",
                    type(request).__name__,
                )
            self.why_not_anew = (
                f"weights were loaded while the server ran ({type(request).__name__}), and it "
                "would have those of the start"
            )
        elif isinstance(request, LoadLoRAAdapterReqInput):
            self.adapters.append(request)
        elif isinstance(request, UnloadLoRAAdapterReqInput):
            self._unload(request)
        else:
            return
        self.count += 1

    def _unload(self, request: UnloadLoRAAdapterReqInput) -> None:
        others = [r for r in self.adapters if r.lora_id != request.lora_id]
        loaded_here = len(others) < len(self.adapters)
        # Of an adapter that came with the start the unloading is to be repeated.
        self.adapters = others if loaded_here else [*others, request]


def repeat(adapters: Iterable[Any], handle: Callable[[Any], Any]) -> None:
    """In a worker that does not serve yet: have upstream handle these requests again. One that
    fails has most likely failed before, too; nobody waits for the answer."""
    for request in adapters:
        done = handle(request)
        if not done.success:
            logger.warning(
                "%s of %s could not be repeated: %s",
                type(request).__name__,
                request.lora_name,
                done.error_message,
            )
