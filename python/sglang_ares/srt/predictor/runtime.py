"""The head inside a worker: in the model's forward, and where its outputs reach the scheduler.

Three hooks (``plugin.py``). After upstream has cut the last layer's hidden states down to one row
per sequence, the head runs on them: on CUDA within the captured graph, whose output buffers are
static. Its output leaves the forward beside the logits, in ``customized_info``, which the graph
runners hand on. After sampling it is cut to the real batch and becomes the step's auxiliary
output, which upstream copies to the host with the sampled tokens and gives back once they are
committed: no synchronisation of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sglang.srt.managers.auxiliary_output import CommittedTokens
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from torch import Tensor

    from sglang_ares.srt.predictor.head import LengthHead
    from sglang_ares.srt.predictor.tracker import PredictionTracker

_RAW: Final = "ares_length"
_STATES: Final = "ares_states"


class ForwardProbe:
    """Runs ``head`` on the states of every step and hands its outputs to ``tracker``, which may
    want the states too. States of another size than the head reads are passed over."""

    def __init__(self, head: LengthHead | None, tracker: PredictionTracker) -> None:
        self._head = head
        self._placed = False
        self._tracker = tracker
        self._keep_states = tracker.wants_states
        self._pending: dict[str, Any] | None = None

    def after_pruning(self, result: Any, *args: Any, **kwargs: Any) -> None:
        """After ``LogitsProcessor._get_pruned_states``: run the head."""
        states, samples = result[0], result[3]
        if samples is not None:
            states = states[samples]
        self._pending = {_STATES: states} if self._keep_states else {}
        if self._head is not None and states.shape[-1] == self._head.hidden_size:
            if not self._placed:
                # Before any graph is captured: upstream warms up first.
                self._head = self._head.to(states.device, states.dtype)
                self._placed = True
            self._pending[_RAW] = self._head(states)

    def after_logits(self, result: Any, *args: Any, **kwargs: Any) -> None:
        """After ``LogitsProcessor.forward``: the output leaves the forward with the logits."""
        if self._pending is not None:
            result.customized_info = {**(result.customized_info or {}), **self._pending}
            self._pending = None

    def after_sampling(
        self, result: Any, runner: Any, logits_output: Any, *args: Any, **kwargs: Any
    ) -> None:
        """After ``ModelRunner.sample``: one row per sampled token, to be copied with the tokens."""
        info = logits_output.customized_info
        if not info or not (_RAW in info or _STATES in info):
            return
        # A captured graph hands out the same dictionary at every replay.
        others = {k: v for k, v in info.items() if k not in (_RAW, _STATES)}
        logits_output.customized_info = others or None
        rows = result.shape[0]
        ours = LengthOutputs(
            self._tracker.observe, _own(info.get(_RAW), rows), _own(info.get(_STATES), rows)
        )
        from sglang.srt.managers.auxiliary_output import append_auxiliary_output

        logits_output.auxiliary_device_output = append_auxiliary_output(
            logits_output.auxiliary_device_output, ours
        )


def _own(static: Tensor | None, rows: int) -> Tensor | None:
    """The first ``rows`` rows; on CUDA a copy, as the next replay overwrites a graph's buffers
    while the copy to the host may still run."""
    if static is None:
        return None
    cut = static[:rows]
    return cut.clone() if cut.is_cuda else cut


class LengthOutputs:
    """Upstream's ``DeviceAuxiliaryOutput`` and, once copied, its ``HostAuxiliaryOutput``.

    ``raw``: ``(B, outputs)`` float32, None without a head. ``states``: ``(B, d)``, None unless they
    are recorded.
    """

    def __init__(
        self, observe: Callable[..., None], raw: Tensor | None, states: Tensor | None
    ) -> None:
        self._observe = observe
        self._raw = raw
        self._states = states

    def copy_to_host(self, copy_tensor: Callable[[Tensor], Tensor]) -> LengthOutputs:
        """Enqueue the copies; they are there when the step's tokens are."""
        return LengthOutputs(
            self._observe,
            copy_tensor(self._raw) if self._raw is not None else None,
            copy_tensor(self._states) if self._states is not None else None,
        )

    def consume(self, batch: ScheduleBatch, commits: Sequence[CommittedTokens | None]) -> None:
        """The step's tokens have been committed: hand the rows over."""
        self._observe(batch.reqs, commits, _to_numpy(self._raw), _to_numpy(self._states))


def _to_numpy(tensor: Tensor | None) -> NDArray[np.float32] | None:
    return tensor.float().numpy() if tensor is not None else None


def hand_over_on_cpu(result: Any) -> None:
    """Instead of upstream's copy of a step's auxiliary output, which marks its end with an event:
    on a CPU the output is there already."""
    logits_output = result.logits_output
    if logits_output is None or logits_output.auxiliary_device_output is None:
        return
    if result.auxiliary_host_output is None:
        output = logits_output.auxiliary_device_output
        result.auxiliary_host_output = output.copy_to_host(lambda tensor: tensor)
        logits_output.auxiliary_device_output = None
