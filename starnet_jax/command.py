"""What the commands share: flags that fail in one line, and the exit code of bad input."""

import argparse
import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from starnet_jax import errors
from starnet_jax.errors import BadInput, Diverged, Interrupted, nearest
from starnet_jax.log import say


class Parser(argparse.ArgumentParser):
    """Argparse that reports a mistake as BadInput, in one line instead of the whole usage."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, args: Sequence[str], namespace=None) -> argparse.Namespace:
        for word in args:  # first, because argparse would rather name a flag that is missing
            flag = word.partition("=")[0]
            if flag.startswith("--") and flag not in self.flags:
                raise BadInput(f"{flag}: unknown flag{nearest(flag, self.flags)}")
        return super().parse_args(args, namespace)

    @property
    def flags(self) -> list[str]:
        """All flags, as `--name`."""
        return [flag for flag in self._option_string_actions if flag.startswith("--")]

    def error(self, message: str):
        raise BadInput(message)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Parts `--config.KEY=VALUE` (or `--config.KEY VALUE`) from the other flags.

    Raises:
      BadInput: a key without a value.
    """
    flags, overrides, words = [], {}, list(argv)
    while words:
        word = words.pop(0)
        if word.startswith("--config."):
            key, equals, value = word.removeprefix("--config.").partition("=")
            if not equals and (not words or words[0].startswith("--")):
                raise BadInput(f"{word}: needs a value")
            overrides[key] = value if equals else words.pop(0)
        else:
            flags.append(word)
    return flags, overrides


def run(body: Callable[[Sequence[str]], object], argv: Sequence[str]) -> int:
    """Calls `body(argv)` and returns the exit code; what is no bug ends in one line."""
    try:
        body(argv)
    except BadInput as error:
        say(f"error: {error}")
        return errors.BAD_INPUT
    except Diverged as error:
        say(f"diverged: {error}")
        return errors.DIVERGED
    except Interrupted as error:
        say(f"interrupted: {error}")
        return errors.INTERRUPTED
    except KeyboardInterrupt:
        say("interrupted")
        return 128 + signal.SIGINT
    except Exception:
        traceback.print_exc()
        return errors.BUG
    return errors.DONE


def end(code: int) -> None:
    """Ends the process, without what libraries do at exit.

    One of several processes would wait for the others there, and on a full disk TensorBoard's
    writer would fail once more. Everything is closed by now.
    """
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)
