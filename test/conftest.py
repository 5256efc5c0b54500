"""Settings of all tests: hypothesis draws the same examples on every run; one torch thread."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow],
)
# More examples, other ones each time: `pytest --hypothesis-profile=explore`.
settings.register_profile("explore", settings.get_profile("ci"), derandomize=False)
settings.load_profile("ci")

# Small tensors: more threads only wait for one another where cores are few. As in the workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
