"""What the command lines share: errors that are the user's to fix, and words that name their nearest relative.

Exit codes: 0 done, 2 the input is wrong (one line on stderr, no traceback), 1 anything else.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class UserError(Exception):
    """The user's input is wrong. Its one line says what happened, what was expected and how to fix it."""


def run(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main` and turn what it raises into the exit codes above."""
    try:
        main()
    except UserError as error:
        print(f"{os.path.basename(sys.argv[0])}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean X?` for the known word closest to `word`, or the list of the known ones."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are `UserError` and whose unknown options name the nearest known one."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists what is known)")

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = super().parse_known_intermixed_args(args, namespace)  # words before and after options
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            word = next((word for word in unknown if word.startswith("-")), unknown[0]).split("=")[0]
            raise UserError(f"unknown option {word}: {nearest(word, options)}")
        return parsed
