"""Hyperparameters of the command line: our own notation, and errors that name what is wrong."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterable
from typing import Any

from rl_zoo3 import utils

from sb3_trpo_ext._checks import closest

#: What RL-Zoo takes out of the settings before it makes the model.
OF_RL_ZOO = (
    "callback",
    "env_kwargs",
    "env_wrapper",
    "frame_stack",
    "monitor_kwargs",
    "n_envs",
    "n_timesteps",
    "noise_std",
    "noise_type",
    "normalize",
    "vec_env_wrapper",
)
#: What RL-Zoo itself gives to the model, from options of these names.
OPTIONS = ("device", "env", "seed", "tensorboard_log", "verbose")


class StoreDict(utils.StoreDict):
    """RL-Zoo's options of the form ``name:value``, such as ``--hyperparams``, where ``lin_0.1`` needs no quotes."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """
        Read the values, which RL-Zoo evaluates as Python.

        :param parser: the parser
        :param namespace: where the values go
        :param values: each a name and a value
        :param option_string: the option's name
        :raises ValueError: if there is no value, or none that Python understands
        """
        read: dict[str, Any] = {}
        for text in values:
            name, _, value = text.partition(":")
            if value.startswith("lin_"):
                text = f"{name}:{value!r}"
            try:
                super().__call__(parser, namespace, [text], option_string)
            # Whatever Python may raise
            except Exception as error:
                raise ValueError(
                    f"{option_string} {text}: must be NAME:VALUE with a value of Python, where a text has quotes of its own, "
                    f"as in \"NAME:'text'\" ({error})"
                ) from error
            read |= getattr(namespace, self.dest)
        setattr(namespace, self.dest, read)


def check_names(names: Iterable[str], algorithm: type) -> None:
    """
    Refuse hyperparameters that an algorithm does not have, before there is a folder, or a model that ignores them.

    :param names: what is left of the settings for the algorithm
    :param algorithm: its class
    :raises ValueError: with the names that come closest
    """
    parameters = inspect.signature(algorithm).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    there = [name for name in (*parameters, *OF_RL_ZOO) if name not in OPTIONS and not name.startswith("_")]
    for name in names:
        if name in OPTIONS:
            raise ValueError(f"{name!r} is no hyperparameter but an option: --{name.replace('_', '-')}")
        if name not in there:
            raise ValueError(f"there is no hyperparameter {name!r} of {algorithm.__name__}; {closest(name, there)}")
