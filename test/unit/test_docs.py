"""The documentation follows the code, and names nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sglang_ares.docgen import PAGES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", PAGES)
def test_generated_pages_are_up_to_date(name: str) -> None:
    """``make docs`` would change nothing."""
    page = ROOT / "docs" / "reference" / name
    assert page.read_text() == PAGES[name](), "run `make docs`"


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/structure.md",
        "docs/migration.md",
        "docs/security.md",
        "docs/simulator.md",
        "docs/elastic.md",
        "docs/results/README.md",
    ],
)
def test_links_lead_somewhere(page: str) -> None:
    """Relative links of the hand-written pages point at files of the repository."""
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{page}: {target}"
