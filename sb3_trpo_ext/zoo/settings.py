"""The settings file, the notation of hyperparameters on the command line, and the check of their names."""

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stable_baselines3.common.utils import LinearSchedule

from sb3_trpo_ext._names import suggestion

#: The name of our TRPO for ``--algo``. RL-Zoo's own key ``trpo`` keeps meaning sb3-contrib's class.
KEY = "trpo_ext"
#: The same with action masks, and with memory.
MASK_KEY, LSTM_KEY = "trpo_ext_mask", "trpo_ext_lstm"
KEYS = (KEY, MASK_KEY, LSTM_KEY)
#: Arguments of TRPO that ``lin_0.1`` in the settings turns into a schedule. RL-Zoo itself does that for ``learning_rate``,
#: ``clip_range``, ``clip_range_vf`` and ``delta_std``.
SCHEDULED = ("target_kl", "cg_damping", "ent_coef")
#: Settings that RL-Zoo uses itself and does not pass to the model.
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
#: Arguments of the model that RL-Zoo sets from options of the same names.
OPTIONS = ("device", "env", "seed", "tensorboard_log", "verbose")


def hyperparams_path(key: str = KEY) -> Path:
    """Path of our settings for RL-Zoo: in the package if installed, else in the repository's top level."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "hyperparams" / f"{key}.yml"
    return installed if installed.is_file() else package.parent / "hyperparams" / f"{key}.yml"


def load_hyperparams(key: str = KEY) -> dict[str, dict[str, Any]]:
    """Our settings for RL-Zoo: hyperparameters by environment id."""
    import yaml

    with hyperparams_path(key).open(encoding="utf-8") as file:
        return yaml.safe_load(file)


def linear_schedule(name: str, text: str) -> LinearSchedule:
    """
    Make a schedule that falls linearly to zero out of RL-Zoo's notation, such as ``lin_0.1``.

    The result is a class of Stable-Baselines3, so that a saved agent loads where RL-Zoo is not installed. Unlike RL-Zoo's own,
    it does not become negative in the last update, which may exceed the number of steps asked for.

    :param name: the argument's name, for the error message
    :param text: ``lin_`` and the initial value
    :return: a function of the remaining progress, which goes from one to zero
    :raises ValueError: if the text is no such schedule
    """
    kind, _, initial_value = text.partition("_")
    try:
        if kind == "lin":
            return LinearSchedule(float(initial_value), 0.0, 1.0)
    except ValueError:
        pass
    raise ValueError(f"`{name}` must be a number or a linear schedule such as 'lin_0.1', got {text!r}")


def quoted(text: str) -> str:
    """``name:lin_0.1`` as ``name:'lin_0.1'``: RL-Zoo evaluates the value as Python."""
    name, _, value = text.partition(":")
    return f"{name}:{value!r}" if value.startswith("lin_") else text


def check_pair(option: str, text: str) -> None:
    """
    Evaluate ``name:value`` as RL-Zoo does.

    :param option: the option, for the error message
    :param text: the name and a value of Python
    :raises ValueError: if there is no value, or none that Python understands
    """
    from rl_zoo3 import utils

    try:
        eval(text.partition(":")[2], vars(utils).copy())
    # `eval` may raise anything
    except Exception as error:
        raise ValueError(
            f"{option} {text}: must be NAME:VALUE with a Python value, a string with quotes as in \"NAME:'text'\" ({error})"
        ) from error


def as_option(flag: str, value: Any) -> list[str]:
    """
    An option as RL-Zoo's parsers take it.

    :param flag: the option
    :param value: of any type; a dictionary becomes ``name:value ...``
    :return: the option and its values; empty if there is none
    """
    if value is None or value is False or value in ("", [], {}):
        return []
    if value is True:
        return [flag]
    if isinstance(value, dict):
        # RL-Zoo evaluates what comes after the colon
        value = [f"{name}:{item!r}" for name, item in value.items()]
    return [flag, *map(str, value if isinstance(value, list) else [value])]


def check_names(names: Iterable[str], algorithm: type) -> None:
    """
    Refuse hyperparameters that do not exist, before RL-Zoo makes a folder.

    :param names: those of the settings, RL-Zoo's own among them
    :param algorithm: the class
    :raises ValueError: with the closest names
    """
    parameters = inspect.signature(algorithm).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = [name for name in (*parameters, *OF_RL_ZOO) if name not in OPTIONS and not name.startswith("_")]
    for name in names:
        if name in OPTIONS:
            raise ValueError(f"{name!r} is not a hyperparameter but an option: --{name.replace('_', '-')}")
        if name not in known:
            # Not that of a class which only the command line knows
            shown = next(kind.__name__ for kind in algorithm.__mro__ if ".zoo." not in kind.__module__)
            raise ValueError(f"there is no hyperparameter {name!r} of {shown}; {suggestion(name, known)}")
