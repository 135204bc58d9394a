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

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


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


def nearest_key(key: str, keys: Iterable[str]) -> str:
    """As `nearest` for dotted keys: first the nearest section, then the nearest name in it."""
    keys = list(keys)
    section, _, name = key.rpartition(".")
    sections = {k.rpartition(".")[0] for k in keys} - {""}
    close = difflib.get_close_matches(section, sections, n=1, cutoff=0.6)
    if not close:
        return nearest(key, keys)
    names = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == close[0]]
    spelled_out = [n for n in names if "".join(word[0] for word in n.split("_")) == name]
    found = spelled_out or difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    if found:
        return f"; did you mean '{close[0]}.{found[0]}'?"
    return f"; known: {', '.join(f'{close[0]}.{n}' for n in names)}"
