"""What the fork server imports once, so that a CPU server's processes start in seconds."""

from __future__ import annotations

import signal

# Upstream imports every model it knows before it loads one: five seconds of a worker's start.
import sglang.srt.models.registry  # noqa: F401
from sglang.srt.utils import kill_itself_when_parent_died

import sglang_ares.srt.managers.controller
import sglang_ares.srt.managers.detokenizer_manager
import sglang_ares.srt.managers.scheduler
import sglang_ares.srt.managers.worker_process  # noqa: F401

# Python's fork server lives as long as its children do. Ours ends with the process that started
# it, and its children with it.
kill_itself_when_parent_died()

# What SIGTERM to all processes of a server means is the front's to decide.
signal.signal(signal.SIGTERM, signal.SIG_IGN)

# Upstream's processes send their parent SIGQUIT when they fail. Here that is the fork server,
# which must outlive them: it starts their successors.
signal.signal(signal.SIGQUIT, signal.SIG_IGN)
