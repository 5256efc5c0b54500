"""``python -m sglang_ares.keys DIR``: make the keys of a cluster's control sockets."""

from __future__ import annotations

import argparse
import sys

from sglang_ares.srt.security.curve import CurveKeys, CurveKeysError

_NEXT_STEPS = """\
{folder} holds the keys of one cluster.
  server.key_secret  client.key_secret   secret, mode 0600: whoever has them is a member
  server.key  client.key  clients/       public
On this host:   --ares-curve-keys {folder}
On every other host of the cluster: copy the whole directory over a secure channel
                (scp -rp {folder} HOST:) and pass the same flag there."""


def main(argv: list[str] | None = None) -> int:
    """Command line entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_ares.keys",
        description="Make the CURVE keys that --ares-curve-keys names.",
    )
    parser.add_argument("directory", metavar="DIR", help="a directory that does not exist yet")
    options = parser.parse_args(argv)
    try:
        folder = CurveKeys.generate(options.directory)
    except CurveKeysError as error:
        print(f"error: {error}.", file=sys.stderr)
        return 2
    print(_NEXT_STEPS.format(folder=folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
