"""Which head a server uses, and its start in a worker."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from sglang_ares.demo_model import MODEL_DIR

if TYPE_CHECKING:
    from sglang_ares.srt.managers.worker_spec import WorkerSpec
    from sglang_ares.srt.predictor.tracker import PredictionTracker

AUTO: Final = "auto"
OFF: Final = "off"
# The head for the embedded model, with its test split.
SHIPPED_HEAD: Final = MODEL_DIR.parent / "length_head"


def chosen_head(predictor: str, model_path: str) -> Path | None:
    """The folder of the head that ``--ares-predictor`` means for a model; None: no head."""
    if predictor == OFF:
        return None
    if predictor == AUTO:
        # No other model has a head that would come by itself.
        shipped = Path(model_path).expanduser().resolve() == MODEL_DIR
        return SHIPPED_HEAD if shipped and SHIPPED_HEAD.exists() else None
    return Path(predictor).expanduser()


def predict_lengths(spec: WorkerSpec, tp_rank: int) -> PredictionTracker | None:
    """Hook the head into this process's forward, if there is one or states are to be recorded."""
    if not spec.predictor and not spec.record_states:
        return None
    from sglang_ares.plugin import hook_forward
    from sglang_ares.srt.predictor.card import load_head
    from sglang_ares.srt.predictor.correction import OnlineCorrection
    from sglang_ares.srt.predictor.recorder import StateRecorder
    from sglang_ares.srt.predictor.runtime import ForwardProbe
    from sglang_ares.srt.predictor.tracker import HeadLaw, PredictionTracker

    head, law = None, None
    if spec.predictor:
        head, card = load_head(Path(spec.predictor))
        law = HeadLaw(head, card.smoothing, OnlineCorrection() if spec.correct_drift else None)
    recorder = None
    if spec.record_states and tp_rank == 0:
        folder = Path(spec.record_states)
        recorder = StateRecorder.in_folder(folder, spec.worker_id, spec.incarnation)
    tracker = PredictionTracker(law, recorder)
    hook_forward(ForwardProbe(head, tracker))
    return tracker
