"""`repnet COMMAND ARGUMENTS`, or `python -m repnet COMMAND ARGUMENTS`."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

_COMMANDS = {"serve": "repnet.serve.__main__"}


def main() -> None:
    """Run the command that is named first; it reads the other arguments."""
    parser = argparse.ArgumentParser(prog="repnet", description=__doc__)
    parser.add_argument("command", choices=_COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see repnet COMMAND --help")
    found = parser.parse_args()
    sys.argv[1:] = found.arguments
    import_module(_COMMANDS[found.command]).main()


if __name__ == "__main__":
    main()
