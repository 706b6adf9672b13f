"""
The options that ``sb3-trpo`` itself reads, checks and fills in; RL-Zoo's scripts read all others.

With ``torchrun -m sb3_trpo_ext.zoo train`` the first process evaluates, writes files and prints; the others only train. After
a failure ``torchrun --max-restarts`` starts all of them again: the first one continues from the last checkpoint in the folder
of its run, and the others get its state.
"""

import argparse
import importlib
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from sb3_trpo_ext._checks import closest
from sb3_trpo_ext.envs.jax_envs import LIBRARIES
from sb3_trpo_ext.parallel.launch import broadcast, is_launched, join_process_group
from sb3_trpo_ext.parallel.reductions import rank
from sb3_trpo_ext.zoo.display import check_window, prepare_film
from sb3_trpo_ext.zoo.settings import KEY, KEYS, as_option, check_pair, hyperparams_path, quoted

#: Scripts of RL-Zoo that load an agent.
LOADING = ("enjoy", "record-video", "record-training")
#: RL-Zoo's folder of agents to download, its default for these scripts.
DOWNLOADED = "rl-trained-agents"
#: Timesteps between checkpoints by default where ``torchrun`` may start the processes again.
SAVE_FREQ = 100_000

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
    **dict.fromkeys(("report", "export"), ("env", "env_kwargs")),
    **dict.fromkeys(("compare", "push", "pull"), ("env",)),
    **dict.fromkeys(("plot-train", "all-plots"), ("algos",)),
}
#: Which of the common options a command's own parser has as well.
PASSED_ON = {"train": _COMMON, "enjoy": _COMMON, "compare": ("gym_packages",)}


class Options(argparse.Namespace):
    """
    The options of a command line: an attribute for each name in ``_OPTIONS``, ``None`` for those that are not given.

    ``name`` is the command, and ``others`` are the arguments that only its own parser reads.
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
    """Settings of a training that RL-Zoo's parser does not have, and whether it has begun, which the manager notes here."""

    in_envpool: bool = False
    #: The run to continue.
    folder: Path | None = None
    has_begun: bool = False
    #: As the user typed it.
    command: str = field(default_factory=lambda: shlex.join(sys.argv))


def parse(name: str, arguments: Sequence[str]) -> Options:
    """
    Read a command line.

    :param name: the command
    :param arguments: what the user wrote after it
    """
    # With abbreviations, as RL-Zoo's parser: one that this parser did not know would be overridden by our default
    parser = argparse.ArgumentParser(f"sb3-trpo {name}", add_help=False)
    for option in (*_COMMON, *_READ.get(name, ())):
        flags, kwargs = _OPTIONS[option]
        parser.add_argument(*flags, dest=option, **kwargs)
    options = Options(name=name, **dict.fromkeys(_OPTIONS))
    _, options.others = parser.parse_known_args(arguments, options)
    return options


def with_defaults(options: Options) -> Options:
    """Fill in our algorithm, our settings and the folder that ``train`` writes to, where they are not given."""
    read = _READ.get(options.name, ())
    defaults = {"algo": KEY, "algos": [KEY]}
    if options.algo in (None, *KEYS):
        defaults |= {"conf_file": str(hyperparams_path(options.algo or KEY)), "folder": "logs"}
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
                check_pair(_OPTIONS[option][0][0], text)
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


def simulator_of(env_id: str | None) -> tuple[str, str] | None:
    """
    Tell the environments of Brax and of MuJoCo Playground from others.

    :param env_id: such as ``"brax/ant"`` or ``"playground/WalkerWalk"``
    :return: the library and the name that it has there; ``None`` if it is another environment
    """
    library, _, name = (env_id or "").partition("/")
    return (library, name) if library in LIBRARIES else None


def register_simulator(env_id: str | None) -> None:
    """
    Let Gymnasium know an environment of Brax or of MuJoCo Playground, to watch an agent in.

    :param env_id: of the command line
    """
    simulator = simulator_of(env_id)
    if simulator is not None and env_id is not None and env_id not in gym.registry:
        kwargs = dict(zip(("library", "env_name"), simulator, strict=True))
        # It has a time limit of its own, and the checker of Gymnasium wants bounds of observations
        gym.register(env_id, "sb3_trpo_ext.envs.single:SingleEnv", disable_env_checker=True, kwargs=kwargs)


def check_env(env_id: str | None) -> None:
    """
    Refuse environments that do not exist.

    :param env_id: of the command line; ``None`` if there is none
    :raises ValueError: if it is missing, or not registered
    """
    if env_id is None:
        raise ValueError("--env is missing: give the id of an environment, such as --env Humanoid-v5")
    if env_id not in gym.registry:
        raise ValueError(f"--env: there is no environment {env_id!r}; {closest(env_id, gym.registry)}")


def choose_run(options: Options) -> None:
    """
    Choose the run that a script of RL-Zoo loads: the latest one that has the model asked for.

    RL-Zoo takes the latest folder, which may belong to a failed start or to a search for hyperparameters.

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


def join_processes(options: Options) -> None:
    """
    Join the other processes of ``torchrun``: all get the same seed, and only the first one prints and tracks.

    Where restarts are allowed, there are checkpoints by default.

    :param options: of ``train``
    :raises ValueError: if the algorithm is not ours, or for a search
    """
    if options.algo not in (None, *KEYS):
        known = f"only {', '.join(KEYS)} train in several processes"
        raise ValueError(f"`--algo`: {known}, got {options.algo!r}: start it without torchrun.")
    if options.optimize:
        raise ValueError("`-optimize`: a search runs in one process: start it without torchrun.")
    join_process_group()
    if options.save_freq is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        options.save_freq = SAVE_FREQ
    if options.seed is None or options.seed < 0:
        options.seed = broadcast(int(np.random.default_rng().integers(2**31)))
    if rank() > 0:
        options.track = None
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 until the process ends


def prepared(options: Options, training: Training) -> Options:
    """
    Check the options and fill them in.

    :param options: of a command
    :param training: its settings are set here
    :return: the options; with ``--resume`` those of the run as well
    """
    if options.resume is not None:
        # Not at the top: it needs pandas
        from sb3_trpo_ext.zoo.resume import saved_arguments

        training.folder = options.resume.absolute()
        # What the user says comes last, where it wins
        options = parse(options.name, [*saved_arguments(training.folder), *options.to_arguments()])
    import_packages(options.gym_packages or ())
    register_simulator(options.env)
    with_defaults(options)
    if "env" in _READ.get(options.name, ()):
        check_env(options.env)
        check_pairs(options)
    if options.name == "train":
        if is_launched():
            join_processes(options)
        training.in_envpool = options.vec_env == "envpool"
        if training.in_envpool:
            # RL-Zoo's parser knows only its own kinds
            options.vec_env = None
    elif options.name == "enjoy":
        check_window(options.no_render)
    elif options.name in LOADING:
        prepare_film(options.env)
    if options.name in LOADING:
        choose_run(options)
    return options
