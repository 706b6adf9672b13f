"""Training in several processes with RL-Zoo: what ``torchrun -m sb3_trpo_ext.zoo train`` does.

The first process evaluates, writes files and prints; the others only train. After a failure ``torchrun --max-restarts`` starts
all of them again: the first one then goes on from the last checkpoint in the folder of its run, and the others get its state.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext.parallel.launch import attempt, broadcast, is_one_machine, join_process_group
from sb3_trpo_ext.parallel.reductions import rank, world_size
from sb3_trpo_ext.zoo.command import KEY
from sb3_trpo_ext.zoo.patching import replaced_all
from sb3_trpo_ext.zoo.resume import going_on_methods

#: In the folder of a run: which launch made it.
LAUNCH_FILE = ".launch"
#: Timesteps between checkpoints where restarts are allowed and the user says nothing.
SAVE_FREQ = 100_000


def complete(arguments: Sequence[str]) -> list[str]:
    """
    Find the other processes, and make the command lines agree; ask for checkpoints where restarts are allowed.

    :param arguments: of ``train``
    :return: the same with a seed, and what else was missing; what we add comes first, so that whatever the user wrote wins
    :raises ValueError: for what cannot be done in several processes
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--algo")
    parser.add_argument("--seed", type=int, default=-1)
    parser.add_argument("--save-freq")
    parser.add_argument("-optimize", "--optimize-hyperparameters", dest="optimize", action="store_true")
    given, _ = parser.parse_known_args(arguments)
    if given.algo not in (None, KEY):
        raise ValueError(f"`--algo`: {KEY} alone trains in several processes, got {given.algo!r}: start it without torchrun.")
    if given.optimize:
        raise ValueError("`-optimize`: a search runs in one process: start it without torchrun.")
    join_process_group()
    added = []
    if given.save_freq is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        added += ["--save-freq", str(SAVE_FREQ)]
    completed = [*added, *(argument for argument in arguments if rank() == 0 or argument != "--track")]
    if given.seed < 0:
        # Last, where it wins over a -1 of the user's
        completed += ["--seed", str(broadcast(int(np.random.default_rng().integers(2**31))))]
    return completed


def launch_name() -> str:
    """
    What all attempts of one launch have in common, and no other launch has.

    :return: the id that ``torchrun`` was given, or the machine and the process of ``torchrun`` itself
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return run_id if run_id != "none" else f"{socket.gethostname()} {os.getppid()}"


def folder_of_launch(manager: ExperimentManager) -> Path | None:
    """
    The folder that an earlier attempt of this launch made.

    :param manager: RL-Zoo's
    :return: the folder, if there is one
    """
    for file in Path(manager.log_path).glob(f"{manager.env_name}_*/{LAUNCH_FILE}"):
        if file.read_text(encoding="utf-8") == launch_name():
            return file.parent
    return None


@contextmanager
def training_together(folder: Path | None = None) -> Iterator[None]:
    """
    Let RL-Zoo train in this process as one of several; its files, evaluations and messages are the first one's alone.

    :param folder: of a run to go on with
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced_all(ExperimentManager, _first(folder) if rank() == 0 else _others()))
        if rank() > 0:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield


def _others() -> dict[str, Any]:
    """
    What RL-Zoo does in all processes but the first: no file, no evaluation.

    :return: methods of the experiment manager by name
    """
    make_envs = ExperimentManager.create_envs

    def create_envs(self: ExperimentManager, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        return make_envs(self, n_envs, eval_env, no_log=True)

    def leave_out(*_: Any) -> None:
        """Do nothing."""

    names = ("create_log_folder", "create_callbacks", "_save_config", "save_trained_model")
    return {"create_envs": create_envs} | dict.fromkeys(names, leave_out)


def _first(folder: Path | None) -> dict[str, Any]:
    """
    What RL-Zoo does in the first process: all that it does alone, with the steps of all processes in mind, and restarts.

    :param folder: of a run to go on with, from the first attempt on
    :return: methods of the experiment manager by name
    """

    def find(manager: ExperimentManager) -> Path | None:
        # On several machines the id of a launch is the user's choice: with the same one the same run goes on
        if folder is None and (attempt() > 0 or not is_one_machine()):
            return folder_of_launch(manager)
        return folder

    methods = going_on_methods(find)
    make_folder, make_callbacks = ExperimentManager.create_log_folder, methods["create_callbacks"]

    @functools.wraps(make_folder)
    def create_log_folder(self: ExperimentManager) -> None:
        make_folder(self)
        (Path(self.save_path) / LAUNCH_FILE).write_text(launch_name(), encoding="utf-8")

    @functools.wraps(make_callbacks)
    def create_callbacks(self: ExperimentManager) -> None:
        # RL-Zoo divides by the number of environments of one process
        for name in ("eval_freq", "save_freq"):
            if getattr(self, name) > 0:
                setattr(self, name, max(getattr(self, name) // world_size(), 1))
        make_callbacks(self)

    return {**methods, "create_log_folder": create_log_folder, "create_callbacks": create_callbacks}
