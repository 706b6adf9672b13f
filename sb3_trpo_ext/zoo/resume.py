"""What continuing a run needs: its options, its last checkpoint and its table of evaluations."""

import contextlib
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.save_util import load_from_zip_file

from sb3_trpo_ext.zoo.options import as_option
from sb3_trpo_ext.zoo.runs import read_settings

#: The options of ``train`` that make a run what it is; they are given again when it continues.
KEPT = (
    "algo",
    "env",
    "env_kwargs",
    "eval_env_kwargs",
    "eval_episodes",
    "eval_freq",
    "device",
    "gym_packages",
    "log_folder",
    "log_interval",
    "n_eval_envs",
    "n_timesteps",
    "num_threads",
    "save_freq",
    "seed",
    "tensorboard_log",
    "vec_env",
    "verbose",
)


class Checkpoint(NamedTuple):
    """A state to continue from."""

    model: Path
    #: VecNormalize's statistics, if the run has any.
    statistics: Path | None
    num_timesteps: int


def saved_arguments(folder: Path) -> list[str]:
    """
    The command line that a run was started with, as far as it matters, with the run's own settings.

    :param folder: of the run
    :raises ValueError: if there is no run in the folder, or no checkpoint
    """
    import yaml

    found = sorted(folder.glob("*/args.yml"))
    saved = read_settings(found[0]) if len(found) == 1 else {}
    settings = read_settings(found[0].with_name("config.yml")) if saved else {}
    if not settings:
        raise ValueError(
            f"`--resume`: there is no run of `sb3-trpo train` in {folder}: give a folder such as logs/trpo_ext/Ant-v5_1."
        )
    env_folder = found[0].parent
    if last_checkpoint(folder, env_folder.name, bool(settings.get("normalize"))) is None:
        raise ValueError(
            f"`--resume`: there is no checkpoint in {folder}: `--save-freq` leaves some, and an interruption leaves one."
        )
    # With `hyperparams` of the command line in it, and whatever the package says by now
    conf_file = env_folder / "settings.yml"
    conf_file.write_text(yaml.safe_dump({saved["env"]: settings}, sort_keys=False), encoding="utf-8")
    arguments = ["--conf-file", str(conf_file)]
    for name in KEPT:
        arguments += as_option(f"--{name.replace('_', '-')}", saved.get(name))
    return arguments


def last_checkpoint(folder: Path, env_name: str, has_statistics: bool) -> Checkpoint | None:
    """
    The latest state in a folder that is complete.

    :param folder: of a run
    :param env_name: of its environment, after which RL-Zoo names the agent that it saves at the end or when interrupted
    :param has_statistics: whether the run normalizes with VecNormalize
    """
    found = []
    # First, where it wins over a checkpoint of the same step: that one comes before the last update
    final = folder / f"{env_name}.zip"
    if (final_steps := _timesteps_of(final)) is not None:
        found.append(Checkpoint(final, folder / env_name / "vecnormalize.pkl", final_steps))
    for model in folder.glob("rl_model_*_steps.zip"):
        if match := re.fullmatch(r"rl_model_(\d+)_steps", model.stem):
            statistics = model.with_name(f"rl_model_vecnormalize_{match[1]}_steps.pkl")
            found.append(Checkpoint(model, statistics, int(match[1])))
    for checkpoint in sorted(found, key=lambda each: -each.num_timesteps):
        if not has_statistics:
            return checkpoint._replace(statistics=None)
        if checkpoint.statistics is not None and _is_readable(checkpoint.statistics):
            return checkpoint
    return None


def _timesteps_of(model: Path) -> int | None:
    """How far an agent has been trained; ``None`` if the file is missing or cut off."""
    # Zipfile, pickle and PyTorch have no common error for a file that is cut off
    with contextlib.suppress(Exception):
        data, _, _ = load_from_zip_file(model, device="cpu")
        return int(data["num_timesteps"]) if data else None
    return None


def _is_readable(path: Path) -> bool:
    """Whether a pickle is complete: the process may have been killed while it wrote it."""
    try:
        with path.open("rb") as file:
            pickle.load(file)
    except (OSError, EOFError, pickle.UnpicklingError):
        return False
    return True


def restore_evaluations(callback: EvalCallback, num_timesteps: int) -> None:
    """
    Let an evaluation continue the table that is there.

    :param callback: RL-Zoo's
    :param num_timesteps: later evaluations are made again
    """
    assert callback.log_path is not None
    try:
        with np.load(f"{callback.log_path}.npz") as table:
            steps, results, lengths = (table[name] for name in ("timesteps", "results", "ep_lengths"))
    # NumPy and zipfile have no common error for a missing or a damaged file
    except Exception:
        return
    callback.best_mean_reward = float(np.max(results.mean(axis=1)))
    n_kept = int((steps <= num_timesteps).sum())
    callback.evaluations_timesteps = steps[:n_kept].tolist()
    callback.evaluations_results = results[:n_kept].tolist()
    callback.evaluations_length = lengths[:n_kept].tolist()
