"""`python -m repnet.hub`: push an artefact, pull one, or write its model card.

Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from repnet.deploy.staging import CARD
from repnet.errors import InputError
from repnet.hub import pull, push_to_hub, write_model_card


def main() -> None:
    """Run the command that the arguments name."""
    arguments = _parser().parse_args()
    try:
        if arguments.command == "push":
            print(
                push_to_hub(
                    arguments.directory,
                    arguments.repo,
                    private=arguments.private,
                    revision=arguments.revision,
                    license=arguments.license,
                )
            )
        elif arguments.command == "pull":
            print(pull(arguments.repo, arguments.directory, revision=arguments.revision))
        else:
            card = arguments.directory / CARD
            if card.exists() and not arguments.overwrite:
                raise InputError(f"'{card}' is there already; replace it with --overwrite")
            print(write_model_card(arguments.directory, license=arguments.license))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m repnet.hub", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    push = commands.add_parser("push", help="upload an artefact with a model card")
    pulls = commands.add_parser("pull", help="download an artefact, and check it")
    card = commands.add_parser("card", help="write README.md into an artefact, for you to edit")
    for command in (push, card):
        command.add_argument("directory", metavar="DIR", type=Path, help="of deploy.py")
    for command in (push, pulls):
        command.add_argument(
            "repo", metavar="REPO", help="OWNER/NAME, or a folder: /PATH, ./PATH, file:///PATH"
        )
        command.add_argument("--revision", help="branch (pull: tag or commit, too)")
    pulls.add_argument("directory", metavar="DIR", type=Path, help="new or empty")
    push.add_argument(
        "--private", action=argparse.BooleanOptionalAction, help="a new repository is private"
    )
    card.add_argument("--overwrite", action="store_true", help="replace a README.md")
    for command in (push, card):
        command.add_argument("--license", help="the Hub's identifier of it, such as apache-2.0")
    return parser


if __name__ == "__main__":
    main()
