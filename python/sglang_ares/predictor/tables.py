"""The figures of an evaluation as tables on the console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Overall, on the longest outputs, by tokens generated and by length."""
    test = report["test"]
    which = "shipped part of the test split" if test["shipped"] else "test split"
    title = f"{report['model']}, {which}: {test['requests']} requests, {test['labels']} labels"
    for part, text in ((None, title), ("longest_10_percent", "the longest 10 % of outputs")):
        console.print(_overall(report["arms"], part, text))
    for key, text in (
        ("by_generated", "MAE by output tokens generated when predicted"),
        ("by_length", "MAE by output tokens in all"),
    ):
        console.print(_binned(report["arms"], key, text))
    compared = report["ours_compared"]
    lower = ", ".join(
        f"{name} {c['mae_lower_percent']} %" for name, c in compared.items() if isinstance(c, dict)
    )
    fewer = compared["parameters_fewer_than_prompt_only_percent"]
    console.print(f"MAE of ours is lower than of: {lower}", soft_wrap=True)
    console.print(f"parameters fewer than prompt-only's: {fewer} %")


def _overall(arms: Mapping[str, Any], part: str | None, title: str) -> Table:
    table = Table(title=title)
    for i, column in enumerate(("arm", "parameters", "MAE", "median error", "≤ 50 %", "≤ 90 %")):
        table.add_column(column, justify="left" if i == 0 else "right")
    for name, arm in arms.items():
        figures = arm[part] if part else arm
        under = figures.get("calibration", {})
        table.add_row(
            name,
            f"{arm['parameters']:,}" if "parameters" in arm else "",
            f"{figures['mae']:.1f}",
            f"{figures['median_absolute_error']:.1f}",
            f"{under['0.5']:.1%}" if under else "",
            f"{under['0.9']:.1%}" if under else "",
        )
    return table


def _binned(arms: Mapping[str, Any], key: str, title: str) -> Table:
    table = Table(title=title)
    first = next(iter(arms.values()))[key]
    for i, column in enumerate(("tokens", "labels", *arms)):
        table.add_column(column, justify="left" if i == 0 else "right")
    for i, b in enumerate(first):
        below = f"{b['below'] - 1:,}" if b["below"] < 1 << 30 else ""
        errors = (f"{arm[key][i]['mae']:.1f}" for arm in arms.values())
        table.add_row(f"{b['from']:,}–{below}", f"{b['labels']:,}", *errors)
    return table
