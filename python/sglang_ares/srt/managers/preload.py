"""What the fork server imports once, so that CPU workers start in seconds."""

from __future__ import annotations

import sglang_ares.srt.managers.scheduler
import sglang_ares.srt.managers.worker_process  # noqa: F401
