"""Checks of single arguments. A failed one raises an :class:`ArgumentError` that names the argument and its value."""

import difflib
import math
from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Any

import numpy as np


class ArgumentError(ValueError, AssertionError):
    """
    A bad argument, with its name, what came and what to do.

    A ``ValueError``; also an ``AssertionError``, which is what Stable-Baselines3's own algorithms raise for some of these, so
    that code which catches theirs catches ours.
    """


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number."""
    try:
        return not isinstance(value, (bool, str)) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def check_number(name: str, value: Any, requirement: str, is_valid: Callable[[float], bool]) -> None:
    """Check one number."""
    if not is_number(value) or not is_valid(float(value)):
        raise ArgumentError(f"`{name}` must be {requirement}, got {value!r}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Check a word that must be one of a few."""
    if value not in choices:
        raise ArgumentError(f"`{name}` must be one of {sorted(choices)}, got {value!r}.")


def check_bool(name: str, value: Any) -> None:
    """Check a switch."""
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentError(f"`{name}` must be True or False, got {value!r}.")


def check_integer(name: str, value: Any, minimum: int) -> int:
    """Check one whole number."""
    # Not 64.0 either: PyTorch would refuse it as a batch size in the middle of the training
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ArgumentError(f"`{name}` must be an integer of at least {minimum}, got {value!r}.")
    return int(value)


def check_seed(seed: Any) -> int | None:
    """Check a seed."""
    is_integer = isinstance(seed, Integral) and not isinstance(seed, bool)
    if seed is not None and not (is_integer and 0 <= seed < 2**32):
        raise ArgumentError(f"`seed` must be an integer from 0 to 2**32 - 1 or None (seeds nothing), got {seed!r}.")
    return None if seed is None else int(seed)


def checked_actions(actions: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Check the shape of the actions of a step, one for each environment."""
    actions = np.asarray(actions)
    if actions.shape != shape:
        raise ArgumentError(f"`actions` must be of shape {shape}, got {actions.shape}.")
    return actions


def closest(name: str, names: Iterable[str]) -> str:
    """A suggestion for a name that does not exist."""
    known = sorted(names)
    matches = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(matches)}?" if matches else f"there are {', '.join(known[:20])}"


def is_known(kind: type | Callable[..., Any]) -> bool:
    """Whether a class or a function is of Stable-Baselines3 or of a package around it, and not of a user's own."""
    return kind.__module__.partition(".")[0] in ("stable_baselines3", "sb3_contrib", "rl_zoo3", "sb3_trpo_ext")
