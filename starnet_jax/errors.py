"""How a process ends: the exit codes, and the errors that are no bugs.

Imports nothing heavy, so that launchers can read the codes without JAX.
"""

import difflib
from collections.abc import Iterable

DONE = 0
BUG = 1
BAD_INPUT = 2
DIVERGED = 3
INTERRUPTED = 75  # saved; start the same command again


class BadInput(ValueError):  # noqa: N818
    """Something the user said cannot work; the message is one line that names it."""


class Interrupted(Exception):  # noqa: N818
    """The run was told to end and has saved; the same command goes on. The message says where."""


class Diverged(ArithmeticError):  # noqa: N818
    """Loss or gradient is not finite any more; the message names the last good checkpoint."""


def nearest(word: object, choices: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` or, when nothing is close, `; known: a, b, c`."""
    choices = list(choices)
    close = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(choices)}"
