"""Checks of TRPO's arguments, so that a mistake is named before anything runs."""

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

from gymnasium import spaces
from stable_baselines3.common.type_aliases import Schedule

#: The two forms of the trust region, with the options that `trust_region_kwargs` may hold.
TRUST_REGION_OPTIONS: dict[str, tuple[str, ...]] = {
    "constraint": ("fill", "damped_scale", "precondition"),
    "penalty": ("learning_rate", "n_epochs", "batch_size", "beta"),
}


def _is_number(value: Any) -> bool:
    """
    Whether a value is a finite real number.

    :param value: anything
    :return: true for finite ints, floats and NumPy scalars, false for bools
    """
    try:
        return not isinstance(value, (bool, str)) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def check_number(name: str, value: Any, requirement: str, is_valid: Callable[[float], bool]) -> None:
    """
    Check one number.

    :param name: of the argument
    :param value: what came
    :param requirement: for the message, such as "positive"
    :param is_valid: whether a finite number is acceptable
    :raises ValueError: if it is no finite number, or not acceptable
    """
    if not _is_number(value) or not is_valid(float(value)):
        raise ValueError(f"`{name}` must be {requirement}, got {value!r}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """
    Check a word that must be one of a few.

    :param name: of the argument
    :param value: what came
    :param choices: what is acceptable
    :raises ValueError: if it is something else
    """
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {sorted(choices)}, got {value!r}.")


def check_bool(name: str, value: Any) -> None:
    """
    Check a switch.

    :param name: of the argument
    :param value: what came
    :raises ValueError: if it is neither True nor False
    """
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {value!r}.")


def check_integer(name: str, value: Any, minimum: int) -> None:
    """
    Check one whole number.

    :param name: of the argument
    :param value: what came
    :param minimum: the smallest acceptable value
    :raises ValueError: if it is no whole number, or too small
    """
    # Not 64.0 either: PyTorch would refuse it as a batch size in the middle of the training
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}, got {value!r}.")


def scheduled(name: str, value: float | Schedule, progress_remaining: float, minimum: float = -math.inf) -> float:
    """
    Value of a hyperparameter that may be a schedule.

    :param name: of the argument
    :param value: a number, or a function of the progress remaining
    :param progress_remaining: from 1 (start) to 0 (end)
    :param minimum: the smallest acceptable value
    :return: the number
    :raises ValueError: if the number is not finite, or too small
    """
    number = value(progress_remaining) if callable(value) else value
    if not _is_number(number) or float(number) < minimum:
        source = (
            f"its schedule returned {number!r} at progress_remaining={progress_remaining:g}"
            if callable(value)
            else repr(value)
        )
        bound = "" if minimum == -math.inf else f" of at least {minimum:g}"
        raise ValueError(f"`{name}` must be a finite number{bound}, got {source}.")
    return float(number)


def check_trust_region(trust_region: Any, options: Any) -> None:
    """
    Check the form of the trust region and its options.

    :param trust_region: what came for ``trust_region``
    :param options: what came for ``trust_region_kwargs``
    :raises ValueError: for an unknown form, an unknown option, or a bad value of a known one
    """
    check_choice("trust_region", trust_region, tuple(TRUST_REGION_OPTIONS))
    if not isinstance(options, dict):
        raise ValueError(f"`trust_region_kwargs` must be a dict, got {options!r}.")
    known = TRUST_REGION_OPTIONS[trust_region]
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"`trust_region_kwargs` of {trust_region!r} has no option {name!r}; there are {list(known)}.")
        full_name = f"trust_region_kwargs[{name!r}]"
        if name in ("fill", "damped_scale", "precondition"):
            check_bool(full_name, value)
        elif name in ("n_epochs", "batch_size"):
            check_integer(full_name, value, 1)
        else:
            check_number(full_name, value, "positive", lambda x: x > 0)


def check_action_space(action_space: spaces.Space) -> None:
    """
    Check that there is a distribution for an action space.

    :param action_space: of the environment
    :raises ValueError: if there is none
    """
    supported = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
    if not isinstance(action_space, supported):
        names = ", ".join(space.__name__ for space in supported)
        raise ValueError(f"TRPO supports the action spaces {names}; the environment has {action_space}.")
    if isinstance(action_space, spaces.MultiBinary) and not isinstance(action_space.n, int):
        raise ValueError(f"MultiBinary actions must have one dimension, got shape {action_space.shape}: flatten the action.")
    if isinstance(action_space, spaces.MultiDiscrete) and action_space.nvec.ndim != 1:
        raise ValueError(f"MultiDiscrete actions must have one dimension, got shape {action_space.shape}: flatten the action.")
