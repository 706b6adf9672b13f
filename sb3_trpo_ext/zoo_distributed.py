"""Training in several processes with RL-Zoo: what ``torchrun -m sb3_trpo_ext.zoo train`` does.

The first process evaluates, writes files and prints; the others only train. After a failure ``torchrun --max-restarts`` starts
all of them again: the first one then goes on from the last checkpoint in the folder of its run, and the others get its state.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import pickle
import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.distributed import attempt, broadcast, is_one_machine, join_process_group
from sb3_trpo_ext.optim.parallel import rank, world_size
from sb3_trpo_ext.runs import read_settings
from sb3_trpo_ext.zoo import KEY, replaced

#: In the folder of a run: which launch made it.
LAUNCH_FILE = ".launch"
#: Timesteps between checkpoints where restarts are allowed and the user says nothing.
SAVE_FREQ = 100_000


class Checkpoint(NamedTuple):
    """A state to go on from."""

    model: Path
    #: VecNormalize's statistics, if the run has any.
    statistics: Path | None
    num_timesteps: int


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


def last_checkpoint(folder: Path, has_statistics: bool) -> Checkpoint | None:
    """
    The latest state in a folder that is complete.

    :param folder: of a run
    :param has_statistics: whether the run normalises with VecNormalize
    :return: the checkpoint, if there is one
    """
    found = []
    for model in folder.glob("rl_model_*_steps.zip"):
        if match := re.fullmatch(r"rl_model_(\d+)_steps", model.stem):
            steps = int(match[1])
            statistics = model.with_name(f"rl_model_vecnormalize_{steps}_steps.pkl") if has_statistics else None
            found.append(Checkpoint(model, statistics, steps))
    for checkpoint in sorted(found, key=lambda each: -each.num_timesteps):
        if checkpoint.statistics is None or _is_readable(checkpoint.statistics):
            return checkpoint
    return None


def _is_readable(path: Path) -> bool:
    """
    Whether a pickle is there in full: the process may have been killed while it wrote it.

    :param path: the file
    :return: false if it is missing or cut off
    """
    try:
        with path.open("rb") as file:
            pickle.load(file)
    except (OSError, EOFError, pickle.UnpicklingError):
        return False
    return True


def resume(manager: ExperimentManager) -> Checkpoint | None:
    """
    Go on in the folder of an earlier attempt, from its last checkpoint.

    :param manager: RL-Zoo's, before it has made anything
    :return: the checkpoint; ``None`` for a start from the beginning
    """
    folder = folder_of_launch(manager)
    if folder is None:
        return None
    manager.save_path, manager.params_path = str(folder), str(folder / manager.env_name)
    has_statistics = bool(read_settings(Path(manager.params_path) / "config.yml").get("normalize"))
    checkpoint = last_checkpoint(folder, has_statistics)
    if checkpoint is None:
        return None
    if checkpoint.statistics is not None:
        # Where RL-Zoo looks for those of an agent that it is to train further
        shutil.copyfile(checkpoint.statistics, Path(manager.params_path) / "vecnormalize.pkl")
    manager.trained_agent, manager.continue_training = str(checkpoint.model), True
    print(f"Going on from {checkpoint.model}")
    return checkpoint


def restore_evaluations(callback: EvalCallback, num_timesteps: int) -> None:
    """
    Let an evaluation go on with the table that is there.

    :param callback: RL-Zoo's
    :param num_timesteps: later evaluations are made again
    """
    assert callback.log_path is not None
    path = Path(f"{callback.log_path}.npz")
    try:
        with np.load(path) as table:
            steps, results, lengths = (table[name] for name in ("timesteps", "results", "ep_lengths"))
    # NumPy and zipfile have no common error for a missing or a damaged file
    except Exception:
        return
    callback.best_mean_reward = float(np.max(results.mean(axis=1)))
    n_kept = int((steps <= num_timesteps).sum())
    callback.evaluations_timesteps = steps[:n_kept].tolist()
    callback.evaluations_results = results[:n_kept].tolist()
    callback.evaluations_length = lengths[:n_kept].tolist()


@contextmanager
def training_together() -> Iterator[None]:
    """Let RL-Zoo train in this process as one of several; its files, evaluations and messages are the first one's alone."""
    with contextlib.ExitStack() as stack:
        for name, function in (_first() if rank() == 0 else _others()).items():
            stack.enter_context(replaced(ExperimentManager, name, function))
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


def _first() -> dict[str, Any]:
    """
    What RL-Zoo does in the first process: all that it does alone, with the steps of all processes in mind, and restarts.

    :return: methods of the experiment manager by name
    """
    manager_class = ExperimentManager
    set_up, make_envs, make_folder = manager_class.setup_experiment, manager_class.create_envs, manager_class.create_log_folder
    make_callbacks, learn_alone = manager_class.create_callbacks, manager_class.learn
    checkpoint: Checkpoint | None = None

    @functools.wraps(set_up)
    def setup_experiment(self: ExperimentManager) -> Any:
        nonlocal checkpoint
        # On several machines the id of a launch is the user's choice: with the same one the same run goes on
        if attempt() > 0 or not is_one_machine():
            checkpoint = resume(self)
        return set_up(self)

    @functools.wraps(make_folder)
    def create_log_folder(self: ExperimentManager) -> None:
        make_folder(self)
        (Path(self.save_path) / LAUNCH_FILE).write_text(launch_name(), encoding="utf-8")

    @functools.wraps(make_envs)
    def create_envs(self: ExperimentManager, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        # EnvPool's environments have no such option
        if checkpoint is not None and getattr(self.args, "vec_env", None) != "envpool":
            self.monitor_kwargs = {**self.monitor_kwargs, "override_existing": False}
        return make_envs(self, n_envs, eval_env, no_log)

    @functools.wraps(make_callbacks)
    def create_callbacks(self: ExperimentManager) -> None:
        # RL-Zoo divides by the number of environments of one process
        for name in ("eval_freq", "save_freq"):
            if getattr(self, name) > 0:
                setattr(self, name, max(getattr(self, name) // world_size(), 1))
        make_callbacks(self)
        for callback in self.callbacks:
            if isinstance(callback, CheckpointCallback):
                callback.save_vecnormalize = True
            if isinstance(callback, EvalCallback) and checkpoint is not None:
                restore_evaluations(callback, checkpoint.num_timesteps)

    @functools.wraps(learn_alone)
    def learn(self: ExperimentManager, model: BaseAlgorithm) -> None:
        if checkpoint is None:
            return learn_alone(self, model)
        original = TRPO.learn

        @functools.wraps(original)
        def go_on(model: TRPO, total_timesteps: int, *args: Any, **kwargs: Any) -> TRPO:
            remaining = max(total_timesteps - model.num_timesteps, 0)
            return original(model, remaining, *args, **{**kwargs, "reset_num_timesteps": False})

        with replaced(TRPO, "learn", go_on):
            return learn_alone(self, model)

    return {
        "setup_experiment": setup_experiment,
        "create_log_folder": create_log_folder,
        "create_envs": create_envs,
        "create_callbacks": create_callbacks,
        "learn": learn,
    }
