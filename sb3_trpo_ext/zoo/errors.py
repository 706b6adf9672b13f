"""One line for what a user can put right, a traceback for all else: how every command of ``sb3-trpo`` ends in an error."""

from __future__ import annotations

import functools
import pickle
import sys
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import gymnasium as gym
import yaml

from sb3_trpo_ext.zoo.patching import replaced_all

#: What wrong options, settings, files and environments raise, here and in the libraries.
EXPECTED = (
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    gym.error.Error,
    pickle.UnpicklingError,
    yaml.YAMLError,
    zipfile.BadZipFile,
)
#: The same of libraries that a search for hyperparameters alone needs, by module.
EXPECTED_OF_SEARCH = {"optuna.exceptions": "OptunaError", "sqlalchemy.exc": "SQLAlchemyError"}
#: Those whose text does not stand alone: that of a KeyError is the key.
UNNAMED = (AttributeError, EOFError, LookupError, TypeError)
#: Methods of RL-Zoo's experiment manager in which training begins; the second one is a trial of a search.
TRAINING = ("learn", "objective")


def expected() -> tuple[type[Exception], ...]:
    """
    The errors that end in one line.

    :return: their classes
    """
    # A library that is not imported raises nothing
    search = [getattr(sys.modules[module], name) for module, name in EXPECTED_OF_SEARCH.items() if module in sys.modules]
    return (*EXPECTED, *search)


def one_line(error: BaseException) -> str:
    """
    An error as one line.

    :param error: the error
    :return: its text, with the name of its class where the text needs it
    """
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {text}".removesuffix(": ") if not text or isinstance(error, UNNAMED) else text


def with_short_errors(command: str, show_traceback: bool, run: Callable[[], None]) -> int:
    """
    Run a command whose errors end in one line, unless training has begun: a crash after three hours needs its traceback.

    :param command: its name
    :param show_traceback: whether to raise all errors as they are
    :param run: the command
    :return: the exit status: 0, or 2 after an error
    """
    has_begun = False

    def noted(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal has_begun
            has_begun = True
            return method(*args, **kwargs)

        return call

    with ExitStack() as stack:
        try:
            from rl_zoo3.exp_manager import ExperimentManager

            methods = {name: noted(getattr(ExperimentManager, name)) for name in TRAINING}
            stack.enter_context(replaced_all(ExperimentManager, methods))
            run()
        except expected() as error:
            if has_begun or show_traceback:
                raise
            print(f"sb3-trpo {command}: error: {one_line(error)} (--verbose 2 shows the traceback)", file=sys.stderr)
            return 2
    return 0
