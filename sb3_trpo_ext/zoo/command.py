"""
The command ``sb3-trpo``: the scripts of RL-Zoo, with the TRPO of this package under the key ``trpo_ext``.

RL-Zoo's own key ``trpo`` keeps meaning sb3-contrib's class here, so that both can be run and compared side by side. To use our
class under the key ``trpo`` of the stock ``rl_zoo3`` command, see ``sb3_trpo_ext.zoo.plugin``.

This module imports only what the package itself needs, so that a command whose extra is missing can say so.
"""

import functools
import importlib
import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from sb3_trpo_ext import __version__
from sb3_trpo_ext.zoo.errors import FAULTS, one_line
from sb3_trpo_ext.zoo.options import PASSED_ON, Options, Training, parse, prepared, with_defaults
from sb3_trpo_ext.zoo.settings import KEY, LSTM_KEY, MASK_KEY, as_option


class Command(NamedTuple):
    """One sub-command."""

    summary: str
    module: str
    #: ``None``: the script is the module's ``__main__`` block.
    function: str | None = "main"


COMMANDS = {
    "init": Command("make a folder with an environment of your own, ready to train in", "sb3_trpo_ext.zoo.init"),
    "train": Command("train an agent, or tune hyperparameters with -optimize", "rl_zoo3.train", "train"),
    "report": Command("evaluate a trained agent and draw its learning curve", "sb3_trpo_ext.tools.report"),
    "export": Command("write a trained agent to a file that runs without Stable-Baselines3", "sb3_trpo_ext.tools.export"),
    "plot": Command("draw returns and updates of one run, or of several", "sb3_trpo_ext.tools.diagnostics"),
    "compare": Command("train several algorithms on a task and compare them", "sb3_trpo_ext.tools.compare"),
    "push": Command("upload a trained agent to the Hugging Face Hub", "sb3_trpo_ext.tools.hub", "push"),
    "pull": Command("download an agent from there", "sb3_trpo_ext.tools.hub", "pull"),
    "enjoy": Command("watch a trained agent", "rl_zoo3.enjoy", "enjoy"),
    "record-video": Command("film a trained agent", "rl_zoo3.record_video", None),
    "record-training": Command("film every checkpoint of a run", "rl_zoo3.record_training", None),
    "plot-train": Command("plot the returns of training", "rl_zoo3.plots", "plot_train"),
    "all-plots": Command("gather and plot the evaluations of runs", "rl_zoo3.plots", "all_plots"),
    "plot-from-file": Command("plot what all-plots has gathered", "rl_zoo3.plots", "plot_from_file"),
}

USAGE = f"""usage: sb3-trpo COMMAND [OPTION ...]

RL-Zoo's scripts for the TRPO of sb3-trpo-ext. All of RL-Zoo's options work; --algo is {KEY} if it is not given.
`--algo {MASK_KEY}` is MaskableTRPO, and `--algo {LSTM_KEY}` is RecurrentTRPO.
`sb3-trpo train --vec-env envpool` trains in EnvPool's environments.
`sb3-trpo train --resume FOLDER` continues the run in that folder from its last checkpoint.

commands:
{chr(10).join(f"  {name:<16} {command.summary}" for name, command in COMMANDS.items())}

`sb3-trpo COMMAND --help` lists the options of a command, `sb3-trpo --version` prints the version."""

TRAIN_HELP = """
options of sb3-trpo:
  --vec-env envpool     train in EnvPool's environments
  --resume FOLDER       continue the run in that folder from its last checkpoint, with the options it was started with
"""
PACKAGES_HELP = """
  --gym-packages MODULE [MODULE ...]
                        modules that register environments, also of the current folder"""
VERBOSE_HELP = """
  --verbose 2           show the traceback of an error"""


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
    options, training = parse(name, arguments), Training(command=shlex.join(["sb3-trpo", name, *arguments]))
    try:
        run(options, training)
    except Exception as error:
        # A crash after three hours needs its traceback
        if training.has_begun or (options.verbose or 0) > 1 or isinstance(error, FAULTS):
            raise
        print(f"sb3-trpo {name}: error: {one_line(error)} (--verbose 2 shows the traceback)", file=sys.stderr)
        return 2
    return 0


def run(options: Options, training: Training) -> None:
    """
    Run a command.

    :param options: its options
    :param training: its settings are set here, and the manager notes in it that training has begun
    """
    command, needs_help = COMMANDS[options.name], not {"-h", "--help"}.isdisjoint(options.others)
    if options.name not in ("init", "plot"):
        # All others use RL-Zoo
        from sb3_trpo_ext.zoo.manager import register

        register(training=training)
    before = sys.argv, sys.path, subprocess.call
    try:
        # Where `python -m` looks; last, where it hides nothing
        sys.path = [*sys.path, os.getcwd()]
        options = with_defaults(options) if needs_help else prepared(options, training)
        # RL-Zoo's scripts read `sys.argv`; its first entry is the name in their usage message
        sys.argv = [f"sb3-trpo {options.name}", *options.to_arguments()]
        with _masks() if options.algo == MASK_KEY else nullcontext():
            if command.function is not None:
                getattr(importlib.import_module(command.module), command.function)()
            else:
                vars(subprocess)["call"] = functools.partial(call_ours, subprocess.call, options)
                runpy.run_module(command.module, run_name="__main__")
    except SystemExit:
        if needs_help:
            print(TRAIN_HELP * (options.name == "train") + "\noptions of every command:", end="")
            print(PACKAGES_HELP * ("gym_packages" not in PASSED_ON.get(options.name, ())) + VERBOSE_HELP)
        raise
    finally:
        sys.argv, sys.path, subprocess.call = before


def _masks() -> AbstractContextManager[None]:
    from sb3_trpo_ext.zoo.masks import scripts_watched

    return scripts_watched()


def call_ours(call: Callable[..., int], options: Options, command: list[str], **kwargs: Any) -> int:
    """``subprocess.call`` for RL-Zoo's ``record_training``, which starts ``python -m rl_zoo3.record_video`` for each agent."""
    if command[:3] == ["python", "-m", "rl_zoo3.record_video"]:
        command = [sys.executable, "-m", "sb3_trpo_ext.zoo", "record-video", *command[3:]]
        command += as_option("--verbose", options.verbose) + as_option("--gym-packages", options.gym_packages)
    return call(command, **kwargs)
