"""The options that ``sb3-trpo`` itself reads, checks and fills in; RL-Zoo's scripts read all others."""

import argparse
import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym

from sb3_trpo_ext.arguments import closest
from sb3_trpo_ext.zoo.settings import KEY, evaluated, hyperparams_path, quoted

#: Scripts of RL-Zoo that load an agent.
LOADING = ("enjoy", "record-video", "record-training")
#: RL-Zoo's folder of agents to download, its default for the scripts that load one.
DOWNLOADED = "rl-trained-agents"

_MANY: dict[str, Any] = {"nargs": "+"}
_SWITCH: dict[str, Any] = {"action": "store_true", "default": None}
_OPTIONS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "verbose": (("--verbose",), {"type": int}),
    "gym_packages": (("--gym-packages",), _MANY),
    "env": (("--env",), {}),
    "algo": (("--algo",), {}),
    "algos": (("-a", "--algo", "--algos"), _MANY),
    "conf_file": (("--conf-file", "-conf"), {}),
    "folder": (("-f", "--folder"), {}),
    "seed": (("--seed",), {"type": int}),
    "save_freq": (("--save-freq",), {"type": int}),
    "optimize": (("--optimize-hyperparameters", "-optimize"), _SWITCH),
    "track": (("--track",), _SWITCH),
    "vec_env": (("--vec-env",), {}),
    "resume": (("--resume",), {"type": Path}),
    "hyperparams": (("--hyperparams", "-params"), _MANY),
    "env_kwargs": (("--env-kwargs",), _MANY),
    "eval_env_kwargs": (("--eval-env-kwargs",), _MANY),
    "exp_id": (("--exp-id",), {"type": int}),
    "load_best": (("--load-best",), _SWITCH),
    "load_checkpoint": (("--load-checkpoint",), {"type": int}),
    "load_last_checkpoint": (("--load-last-checkpoint",), _SWITCH),
    "no_render": (("--no-render",), _SWITCH),
}
_COMMON = ("verbose", "gym_packages")
_PAIRS = ("hyperparams", "env_kwargs", "eval_env_kwargs")
_LOADED = ("env", "algo", "folder", "env_kwargs", "exp_id", "load_best", "load_checkpoint", "load_last_checkpoint")
_READ = {
    "train": ("env", "algo", "conf_file", "seed", "save_freq", "optimize", "track", "vec_env", "resume", *_PAIRS),
    **dict.fromkeys(LOADING, (*_LOADED, "no_render")),
    **dict.fromkeys(("plot-train", "all-plots"), ("algos",)),
}
#: Which of the options of every command its own parser has as well.
PASSED_ON = {"train": _COMMON, "enjoy": _COMMON, "compare": ("gym_packages",)}


class Options(argparse.Namespace):
    """
    What a command line says: an attribute for each name in ``_OPTIONS``, ``None`` where it says nothing.

    ``name`` is the command, and ``others`` are the arguments that its own parser alone reads.
    """

    def to_arguments(self) -> list[str]:
        """The command line for the command's own parser."""
        left_out = {"resume", *_COMMON}.difference(PASSED_ON.get(self.name, ()))
        arguments = list(self.others)
        for name, (flags, _) in _OPTIONS.items():
            arguments += [] if name in left_out else as_option(flags[0], getattr(self, name))
        return arguments


@dataclass
class Training:
    """What our own options ask of a training, and whether it has begun, which RL-Zoo's manager notes here."""

    in_envpool: bool = False
    #: Of the run to continue.
    folder: Path | None = None
    has_begun: bool = False


def parse(name: str, arguments: Sequence[str]) -> Options:
    """
    Read a command line.

    :param name: the command
    :param arguments: what the user wrote after it
    """
    parser = argparse.ArgumentParser(f"sb3-trpo {name}", add_help=False, allow_abbrev=False)
    for option in (*_COMMON, *_READ.get(name, ())):
        flags, kwargs = _OPTIONS[option]
        parser.add_argument(*flags, dest=option, **kwargs)
    options = Options(name=name, **dict.fromkeys(_OPTIONS))
    _, options.others = parser.parse_known_args(arguments, options)
    return options


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


def with_defaults(options: Options) -> Options:
    """Ask for our algorithm, our settings and the folder that ``train`` writes to, where the user says nothing."""
    read = _READ.get(options.name, ())
    defaults = {"algo": KEY, "algos": [KEY]}
    if options.algo in (None, KEY):
        defaults |= {"conf_file": str(hyperparams_path()), "folder": "logs"}
    for name, value in defaults.items():
        if name in read and getattr(options, name) is None:
            setattr(options, name, value)
    return options


def check_pairs(options: Options) -> None:
    """
    Put quotes around schedules such as ``target_kl:lin_0.1``, and check everything of the form ``name:value``.

    :raises ValueError: with the option and what is wrong in it
    """
    for option in _PAIRS:
        if texts := getattr(options, option):
            texts = [quoted(text) for text in texts]
            for text in texts:
                evaluated(_OPTIONS[option][0][0], text)
            setattr(options, option, texts)


def import_packages(modules: Iterable[str]) -> None:
    """
    Let modules register their environments.

    :raises ImportError: if there is no such module, or none that it needs
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(f"--gym-packages {module}: {error}") from error


def check_env(env_id: str | None) -> str:
    """
    Refuse environments that do not exist.

    :param env_id: of the command line; ``None`` if there is none
    :return: the same
    :raises ValueError: if it is missing, or not registered
    """
    if env_id is None:
        raise ValueError("--env is missing: give the id of an environment, such as --env Humanoid-v5")
    if env_id not in gym.registry:
        raise ValueError(f"--env: there is no environment {env_id!r}; {closest(env_id, gym.registry)}")
    return env_id


def choose_run(options: Options) -> None:
    """
    Name the run that a script of RL-Zoo is to load: the latest one that has the model asked for.

    RL-Zoo takes the latest folder, which may be that of a start that failed or of a search for hyperparameters.

    :raises ValueError: if there is no such run
    """
    from huggingface_sb3 import EnvironmentName

    from sb3_trpo_ext.zoo.runs import latest_run

    folder = options.folder or DOWNLOADED
    if options.exp_id or DOWNLOADED in folder:
        return
    env_name = EnvironmentName(options.env)
    if options.name == "record-training":
        wanted = [f"{env_name}.zip", "best_model.zip", "rl_model_*_steps.zip"]
    elif options.load_best:
        wanted = ["best_model.zip"]
    elif options.load_checkpoint is not None:
        wanted = [f"rl_model_{options.load_checkpoint}_steps.zip"]
    elif options.load_last_checkpoint:
        wanted = ["rl_model_*_steps.zip"]
    else:
        wanted = [f"{env_name}.zip"]
    options.exp_id = latest_run(Path(folder) / options.algo, env_name, wanted)
