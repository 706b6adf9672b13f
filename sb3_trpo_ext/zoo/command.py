"""
The command ``sb3-trpo``: the scripts of RL-Zoo, with the TRPO of this package under the key ``trpo_ext``.

RL-Zoo's own key ``trpo`` keeps meaning sb3-contrib's class here, so that both can be run and compared side by side. To use our
class under the key ``trpo`` of the stock ``rl_zoo3`` command, see ``sb3_trpo_ext.zoo.plugin``.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from stable_baselines3.common.utils import LinearSchedule

from sb3_trpo_ext import TRPO, TrainingRecorder, __version__
from sb3_trpo_ext.callbacks import TimedEvalCallback
from sb3_trpo_ext.parallel.launch import is_launched
from sb3_trpo_ext.zoo.display import check_window, prepare_film
from sb3_trpo_ext.zoo.errors import with_short_errors
from sb3_trpo_ext.zoo.options import (
    COMMON_HELP,
    TRAIN_HELP,
    Common,
    check_env,
    env_of,
    import_packages,
    split_common,
    with_chosen_run,
)
from sb3_trpo_ext.zoo.patching import replaced

KEY = "trpo_ext"

# Arguments of TRPO that may be schedules; RL-Zoo itself turns only `learning_rate` into one.
SCHEDULED = ("target_kl", "cg_damping", "ent_coef")


class Command(NamedTuple):
    """One sub-command, and what it assumes where the user says nothing."""

    summary: str
    module: str
    # None: the script is the module's `__main__` block
    function: str | None
    # The option that takes the algorithm's key, None if there is none to complete
    algo_option: str | None = None
    # The folder of the runs, where RL-Zoo's own default is its collection of downloadable agents
    folder: str | None = None
    # Those of the options of every command that its own parser reads as well
    known: tuple[str, ...] = ()


COMMANDS = {
    "train": Command(
        "train an agent, or tune hyperparameters with -optimize",
        "rl_zoo3.train",
        "train",
        "--algo",
        known=("--verbose", "--gym-packages"),
    ),
    "report": Command("evaluate a trained agent and draw its learning curve", "sb3_trpo_ext.tools.report", "main"),
    "plot": Command("draw returns and updates of one run, or of several", "sb3_trpo_ext.tools.diagnostics", "main"),
    "compare": Command(
        "train several algorithms on a task and compare them", "sb3_trpo_ext.tools.compare", "main", known=("--gym-packages",)
    ),
    "enjoy": Command(
        "watch a trained agent", "rl_zoo3.enjoy", "enjoy", "--algo", "logs", known=("--verbose", "--gym-packages")
    ),
    "record-video": Command("film a trained agent", "rl_zoo3.record_video", None, "--algo", "logs"),
    "record-training": Command("film every checkpoint of a run", "rl_zoo3.record_training", None, "--algo", "logs"),
    "plot-train": Command("plot the returns of training", "rl_zoo3.plots", "plot_train", "--algo"),
    "all-plots": Command("gather and plot the evaluations of runs", "rl_zoo3.plots", "all_plots", "--algos"),
    "plot-from-file": Command("plot what all-plots has gathered", "rl_zoo3.plots", "plot_from_file"),
}
#: Scripts of RL-Zoo that load an agent.
LOADING = ("enjoy", "record-video", "record-training")

USAGE = f"""usage: sb3-trpo COMMAND [OPTION ...]

RL-Zoo's scripts for the TRPO of sb3-trpo-ext. All of RL-Zoo's options work; --algo is {KEY} if it is not given.
`sb3-trpo train --vec-env envpool` trains in EnvPool's environments.
`sb3-trpo train --resume FOLDER` goes on with the run in that folder, from its last checkpoint.

commands:
{chr(10).join(f"  {name:<16} {command.summary}" for name, command in COMMANDS.items())}

`sb3-trpo COMMAND --help` lists the options of a command, `sb3-trpo --version` tells the version."""


def hyperparams_path() -> Path:
    """
    Path of ``trpo_ext.yml``, the settings for RL-Zoo: in the package if installed, else in the repository's top level.

    :return: the path of an existing file
    """
    package = Path(__file__).resolve().parents[1]
    installed = package / "hyperparams" / "trpo_ext.yml"
    return installed if installed.is_file() else package.parent / "hyperparams" / "trpo_ext.yml"


def load_hyperparams() -> dict[str, dict[str, Any]]:
    """
    Read our settings for RL-Zoo.

    :return: the arguments of every environment, by environment id
    """
    with hyperparams_path().open(encoding="utf-8") as file:
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


def place_recorders(callbacks: Any, folder: str | None) -> list[Any]:
    """
    Give every ``TrainingRecorder`` among RL-Zoo's callbacks the folder of the run, which nobody knows who writes the settings.

    :param callbacks: what the settings have under ``callback``: a name, a name with arguments, or a list of these
    :param folder: the folder of the run; None leaves the recorders out
    :return: the callbacks for RL-Zoo
    """
    names = (f"sb3_trpo_ext.{TrainingRecorder.__name__}", f"{TrainingRecorder.__module__}.{TrainingRecorder.__name__}")
    placed = []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if callback not in names:
            placed.append(callback)
        elif folder is not None:
            placed.append({callback: {"folder": folder}})
    return placed


def _extend_experiment_manager() -> None:
    """
    Let RL-Zoo's experiment manager understand schedules of our arguments, for our class alone, and place our recorder.

    It also refuses names of hyperparameters that do not exist. Two classes take the place of those that RL-Zoo instantiates:
    one tells how long evaluations took; the other one reads ``name:value``, and the scripts import it when they start.
    """
    from rl_zoo3 import ALGOS, exp_manager, utils
    from rl_zoo3.exp_manager import ExperimentManager
    from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback, ProgressBarCallback

    from sb3_trpo_ext.zoo.settings import StoreDict, check_names

    original, original_callbacks = ExperimentManager._preprocess_hyperparams, ExperimentManager.create_callbacks
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def preprocess(self: ExperimentManager, hyperparams: dict[str, Any]) -> Any:
        # Other algorithms have strings of their own here, such as SAC's ent_coef="auto".
        if ALGOS[self.algo] is TRPO:
            for name in SCHEDULED:
                if isinstance(hyperparams.get(name), str):
                    hyperparams[name] = linear_schedule(name, hyperparams[name])
        if hyperparams.get("callback") is not None:
            # A search for hyperparameters has no folder for its trials
            folder = None if self.optimize_hyperparameters else self.save_path
            hyperparams["callback"] = place_recorders(hyperparams["callback"], folder)
        result = original(self, hyperparams)
        check_names(result[0], ALGOS[self.algo])
        return result

    @functools.wraps(original_callbacks)
    def create_callbacks(self: ExperimentManager) -> None:
        original_callbacks(self)
        for callback in self.callbacks:
            if isinstance(callback, CheckpointCallback):
                # An agent is of no use without the statistics that its observations were normalised with
                callback.save_vecnormalize = True
        # When training is interrupted RL-Zoo closes its first callback alone, which it takes to be the progress bar
        self.callbacks.sort(key=lambda callback: not isinstance(callback, ProgressBarCallback))

    setattr(ExperimentManager, original.__name__, preprocess)
    setattr(ExperimentManager, original_callbacks.__name__, create_callbacks)
    setattr(exp_manager, EvalCallback.__name__, TimedEvalCallback)
    setattr(utils, StoreDict.__name__, StoreDict)


def register(key: str = KEY) -> None:
    """
    Make the TRPO of this package known to RL-Zoo: the class, its Optuna search space, its schedules and its record.

    :param key: the name for ``--algo``; an existing one is replaced in this process
    """
    from rl_zoo3 import ALGOS
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

    from sb3_trpo_ext.zoo.search_space import convert_trpo_params, sample_trpo_params

    ALGOS[key] = TRPO
    HYPERPARAMS_SAMPLER[key] = sample_trpo_params
    HYPERPARAMS_CONVERTER[key] = convert_trpo_params
    _extend_experiment_manager()


def with_defaults(name: str, arguments: Sequence[str]) -> list[str]:
    """
    Complete a command line with our algorithm, our settings and the folder that ``train`` writes to.

    :param name: the command
    :param arguments: what the user wrote after it
    :return: the arguments for RL-Zoo's script; what we add comes first, so that whatever the user wrote wins
    """
    command = COMMANDS[name]
    parser = argparse.ArgumentParser(f"sb3-trpo {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("-a", "--algo", "--algos", dest="algos", nargs="+")
    parser.add_argument("-conf", "--conf-file", dest="conf_file")
    parser.add_argument("-f", "--folder", dest="folder")
    given, _ = parser.parse_known_args(arguments)

    defaults = []
    if command.algo_option is not None and given.algos is None:
        defaults += [command.algo_option, KEY]
    if given.algos in (None, [KEY]):
        if name == "train" and given.conf_file is None:
            defaults += ["--conf-file", str(hyperparams_path())]
        if command.folder is not None and given.folder is None:
            defaults += ["--folder", command.folder]
    return [*defaults, *arguments]


def _call_through_us(common: Common, command: list[str], **kwargs: Any) -> int:
    """``subprocess.call`` for ``record_training``, whose ``python -m rl_zoo3.record_video`` would not know our key."""
    if command[:3] == ["python", "-m", "rl_zoo3.record_video"]:
        command = [sys.executable, "-m", "sb3_trpo_ext.zoo", "record-video", *command[3:], "--verbose", str(common.verbose)]
        command += ["--gym-packages", *common.gym_packages] if common.gym_packages else []
    with subprocess.Popen(command, **kwargs) as process:
        return process.wait()


def _prepare_training(stack: ExitStack, arguments: Sequence[str]) -> list[str]:
    """
    Do what our options of ``train`` ask for, and what ``torchrun`` does.

    :param stack: holds what is changed in RL-Zoo for this training
    :param arguments: what the user wrote after ``train``
    :return: the arguments for RL-Zoo
    """
    from sb3_trpo_ext.zoo.envpool import envpool_for_training, split_vec_env
    from sb3_trpo_ext.zoo.resume import going_on, split_resume

    folder, arguments = split_resume(arguments)
    in_envpool, arguments = split_vec_env(arguments)
    if in_envpool:
        stack.enter_context(envpool_for_training())
    if is_launched():
        from sb3_trpo_ext.zoo.processes import complete, training_together

        arguments = complete(arguments)
        stack.enter_context(training_together(folder))
    elif folder is not None:
        stack.enter_context(going_on(folder))
    return arguments


def _complete(stack: ExitStack, name: str, arguments: Sequence[str]) -> list[str]:
    """
    Check and complete a command line, and do what our own options ask for.

    :param stack: holds what is changed for this command
    :param name: the command
    :param arguments: what the user wrote after it, without the options of every command
    :return: the arguments for the command's script
    """
    if name == "train":
        arguments = _prepare_training(stack, arguments)
    arguments = with_defaults(name, arguments)
    if name in ("train", *LOADING):
        env_id = check_env(env_of(arguments))
        if name == "enjoy":
            check_window(arguments)
        elif name != "train":
            prepare_film(env_id)
    return with_chosen_run(name, arguments) if name in LOADING else arguments


def _run(name: str, common: Common) -> None:
    """
    Run a command.

    :param name: the command
    :param common: its options
    """
    register()
    command, arguments = COMMANDS[name], common.others
    with ExitStack() as stack:
        # Where `python -m` looks; last, where it hides nothing
        stack.enter_context(replaced(sys, "path", [*sys.path, os.getcwd()]))
        import_packages(common.gym_packages)
        if {"-h", "--help"}.isdisjoint(arguments):
            arguments = _complete(stack, name, arguments)
        else:
            arguments = with_defaults(name, arguments)
            stack.callback(print, f"\n{TRAIN_HELP if name == 'train' else ''}{COMMON_HELP}")
        # RL-Zoo's scripts read `sys.argv`; its first entry is the name in their usage message.
        stack.enter_context(replaced(sys, "argv", [f"sb3-trpo {name}", *arguments]))
        if command.function is not None:
            getattr(importlib.import_module(command.module), command.function)()
        else:
            with replaced(subprocess, "call", functools.partial(_call_through_us, common)):
                runpy.run_module(command.module, run_name="__main__")


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command ``sb3-trpo``.

    :param argv: the arguments, those of the process if None
    :return: the exit status: 0, or 2 for what the user can put right, such as a command that does not exist
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments else ""
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    if name == "--version":
        print(f"sb3-trpo-ext {__version__}")
        return 0
    if name not in COMMANDS:
        problem = f"there is no command {name!r}" if name else "a command is missing"
        print(f"{USAGE}\n\nsb3-trpo: error: {problem}", file=sys.stderr)
        return 2
    common = split_common(arguments, COMMANDS[name].known)
    return with_short_errors(name, common.verbose > 1, lambda: _run(name, common))
