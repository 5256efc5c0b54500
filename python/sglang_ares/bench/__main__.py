"""``python -m sglang_ares.bench``: measurements of running servers."""

from __future__ import annotations

import argparse
import sys
from types import ModuleType

from sglang_ares.bench import calibrate, goodput

COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "calibrate": (calibrate, "fit a profile to a running server"),
    "goodput": (goodput, "the highest request rate at which enough requests meet their SLOs"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; the exit status. What it does not know are flags of the servers it
    starts."""
    parser = argparse.ArgumentParser(prog="python -m sglang_ares.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, text) in COMMANDS.items():
        module.add_arguments(
            commands.add_parser(
                name,
                help=text,
                description=f"{text[0].upper()}{text[1:]}. Flags it does not know go to the server "
                "it starts.",
                formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            )
        )
    options, server_flags = parser.parse_known_args(argv)
    if server_flags and getattr(options, "url", None):
        parser.error(f"{server_flags[0]} is no flag of {options.command}, and no server is started")
    module, _ = COMMANDS[options.command]
    status: int = module.main(options, server_flags)
    return status


if __name__ == "__main__":
    sys.exit(main())
