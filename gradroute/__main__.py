"""`python -m gradroute`: a report of what runs on this machine, and the commands that prove and tune it."""

from __future__ import annotations

import argparse
import importlib
import sys

from .machine import report

# Command → what it does; its module is `gradroute.machine.COMMAND.command`, whose `main(arguments)` runs it.
COMMANDS: dict[str, str] = {
    "check": "`check` proves every backend on this machine, and has the automatic choice leave out what is wrong.",
    "tune": "`tune` measures what is fastest on this machine, for the automatic choice to follow.",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; the exit code is 0 where all is well, and 1 where something is wrong with a backend."""
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0] in COMMANDS:
        command = importlib.import_module(f"gradroute.machine.{words[0]}.command")
        return command.main(words[1:])
    parser = argparse.ArgumentParser(
        prog="python -m gradroute",
        description="Reports what runs on this machine. " + " ".join(COMMANDS.values()),
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return report.main(parser.parse_args(words).json)


if __name__ == "__main__":
    sys.exit(main())
