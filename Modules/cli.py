"""What the command lines share: errors that are the user's to fix, and words that name their nearest relative.

Exit codes: 0 done, 2 the input is wrong (one line on stderr, no traceback), 1 anything else.
"""

import argparse
import difflib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
STOPS = (signal.SIGINT, signal.SIGTERM)


class UserError(Exception):
    """The user's input is wrong. Its one line says what happened, what was expected and how to fix it."""


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM (`number`) ended the work; its line, if any, says how to go on."""

    def __init__(self, number: int, line: str = ""):
        super().__init__(line)
        self.number = number


def run(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main` and turn what it raises into the exit codes above; a signal's is 128 and its number."""
    with _handling(_stop):
        try:
            main()
        except UserError as error:
            _say(str(error))
            sys.exit(2)
        except OSError as error:
            if error.errno not in DISK:
                raise
            _say(f"{error.filename or 'a file'}: {error.strerror}; make room or name another place, then try again")
            sys.exit(2)
        except KeyboardInterrupt as stop:
            if str(stop):
                _say(str(stop))
            sys.exit(128 + getattr(stop, "number", signal.SIGINT))
    sys.exit(0)


@contextmanager
def stopping() -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM meanwhile goes on this list, so that work can end in good order; the next one stops.

    In another thread than the main one, which gets no signals, the list stays empty.
    """
    arrived = []

    def handle(number: int, frame: object) -> None:
        if arrived:
            raise Stopped(number)
        arrived.append(number)
        os.write(2, b"\nStopping after this step; once more stops at once.\n")

    with _handling(handle):
        yield arrived


@contextmanager
def _handling(handle: Callable) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.signal(number, handle) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _stop(number: int, frame: object) -> None:
    raise Stopped(number)


def _say(line: str) -> None:
    print(f"{os.path.basename(sys.argv[0])}: {' '.join(line.split())}", file=sys.stderr)


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
