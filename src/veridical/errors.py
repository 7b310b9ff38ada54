"""Errors that a person can act on: what arrived, what was expected, the nearest valid name, in one line.

The command line prints the message of a `VeridicalError` and exits with status 2; anything else is a bug and
keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class VeridicalError(Exception):
    """Base of every error that Veridical raises on purpose."""


class InputError(VeridicalError, ValueError):
    """An argument or a data set that cannot be used as it is."""


class UnknownNameError(InputError):
    """A name (site, model, column, option, ...) that does not exist; the message gives the nearest."""


class ConfigError(InputError):
    """A recipe or a set of options that is not valid."""


class DataError(InputError):
    """Pairs, texts or labels that do not fit what was asked."""


class ModelError(VeridicalError, RuntimeError):
    """A model that cannot be loaded, or that does not behave as its sites say."""


class NonFiniteError(VeridicalError, ArithmeticError):
    """NaN or infinity where numbers were expected; the message says where they arose."""


class BudgetError(VeridicalError, RuntimeError):
    """A budget that could not be kept to; what it allows was saved, and the message says where."""


class StoreError(VeridicalError, RuntimeError):
    """An activation store that cannot be used."""


class StoreMismatchError(StoreError):
    """A store in the folder was made by something else; the message names the difference."""


class DamagedFileError(StoreError):
    """A file whose bytes are not those that were written; the message names it."""


class DiskFullError(StoreError, OSError):
    """No space is left; what was complete before is still usable."""


def nearest(name: str, options: Iterable[str], n: int = 3) -> list[str]:
    """The `n` options closest to `name`, best first; empty when nothing is close."""
    return get_close_matches(str(name), list(map(str, options)), n=n, cutoff=0.4)


def misspelt(name: str, options: Iterable[str]) -> bool:
    """Whether a name without an owner is so close to one of `options` that asking the hub for it would only
    cost its retries (half a minute without a network)."""
    return "/" not in name and bool(get_close_matches(name, list(options), cutoff=0.8))


def unknown(kind: str, name: object, options: Iterable[str], hint: str = "") -> UnknownNameError:
    """The error for a name that is not among `options`.

    Args:
        kind: What the name was meant to be, such as "site" or "column".
        name: What arrived.
        options: The valid names.
        hint: A further sentence, such as how to name something that is not in the list.
    """
    names = [str(option) for option in options]
    close = nearest(str(name), names)
    if close:
        said = f"nearest: {', '.join(close)}"
    elif names:
        shown = ", ".join(names[:12]) + (f", and {len(names) - 12} more" if len(names) > 12 else "")
        said = f"there are: {shown}"
    else:
        said = f"there is no {kind} here"
    message = f"unknown {kind} {name!r}; {said}"
    return UnknownNameError(f"{message}. {hint}" if hint else message)
