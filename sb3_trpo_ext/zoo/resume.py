"""What continuing a run needs: its folder, its options, its last checkpoint and its table of evaluations."""

import contextlib
import os
import pickle
import re
import socket
from pathlib import Path
from typing import NamedTuple

import numpy as np
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.save_util import load_from_zip_file

from sb3_trpo_ext._files import replacing
from sb3_trpo_ext.zoo.runs import has_objects, monitored_episodes, read_settings
from sb3_trpo_ext.zoo.settings import as_option

#: Options of ``train`` that are not given again when a run continues: its settings and its agent are in its folder.
NOT_KEPT = ("command", "conf_file", "hyperparams", "track", "trained_agent", "trial_id", "truncate_last_trajectory", "uuid")
#: In the folder of a run: which launch of ``torchrun`` made it.
LAUNCH_FILE = ".launch"
#: Lines of a monitor file before those of the episodes.
N_HEADERS = 2


class Checkpoint(NamedTuple):
    """A state to continue from."""

    model: Path
    #: VecNormalize's statistics; ``None`` if the run has none.
    statistics: Path | None
    num_timesteps: int


def saved_arguments(folder: Path) -> list[str]:
    """
    The options that a run was started with, and its settings as a file.

    :param folder: of the run
    :raises ValueError: if there is no run in the folder, or no checkpoint
    """
    import yaml

    args_file = next(folder.glob("*/args.yml"), folder / "args.yml")
    config_file = args_file.with_name("config.yml")
    saved, settings = read_settings(args_file), read_settings(config_file)
    for path, content in ((args_file, saved), (config_file, settings)):
        if content:
            continue
        if path.is_file():
            raise ValueError(f"`--resume`: {path} is empty or damaged")
        raise ValueError(
            f"`--resume`: there is no run of `sb3-trpo train` in {folder}: give one such as logs/trpo_ext/Ant-v5_1"
        )
    kept = {name: value for name, value in saved.items() if name not in NOT_KEPT}
    for path, content in ((args_file, kept), (config_file, settings)):
        if objects := [name for name, value in content.items() if has_objects(value)]:
            raise ValueError(
                f"`--resume`: {path} has Python objects in {', '.join(objects)}, which are not read again. Write them as text "
                "in the settings, such as policy_kwargs: 'dict(activation_fn=nn.ReLU)' in a YAML file, for a run to resume."
            )
    if last_checkpoint(folder, args_file.parent.name) is None:
        raise ValueError(f"`--resume`: there is no checkpoint in {folder}: `--save-freq` saves some, an interruption one")
    # The settings as they were, `--hyperparams` included, whatever the package's file says now
    conf_file = args_file.with_name("settings.yml")
    with replacing(conf_file) as path:
        path.write_text(yaml.safe_dump({saved["env"]: settings}, sort_keys=False), encoding="utf-8")
    arguments = ["--conf-file", str(conf_file)]
    for name, value in kept.items():
        arguments += as_option(f"--{name.replace('_', '-')}", value)
    return arguments


def last_checkpoint(folder: Path, env_name: str) -> Checkpoint | None:
    """
    The latest state in a folder that is complete.

    :param folder: of a run
    :param env_name: of its environment, after which RL-Zoo names the agent that it saves at the end or when interrupted
    """
    settings = read_settings(folder / env_name / "config.yml")
    # Where they are damaged, the files tell
    has_statistics = settings.get("normalize") if settings else any(folder.rglob("*vecnormalize*.pkl"))
    found = []
    # First, where it wins over a checkpoint of the same step: that one comes before the last update
    final = folder / f"{env_name}.zip"
    if (final_steps := _timesteps_of(final)) is not None:
        own, latest = statistics_of(folder, final_steps), folder / env_name / "vecnormalize.pkl"
        found.append(Checkpoint(final, own if _is_readable(own) else latest, final_steps))
    for model in folder.glob("rl_model_*_steps.zip"):
        if match := re.fullmatch(r"rl_model_(\d+)_steps", model.stem):
            found.append(Checkpoint(model, statistics_of(folder, int(match[1])), int(match[1])))
    for checkpoint in sorted(found, key=lambda each: -each.num_timesteps):
        if not has_statistics:
            return checkpoint._replace(statistics=None)
        if checkpoint.statistics is not None and _is_readable(checkpoint.statistics):
            return checkpoint
    return None


def statistics_of(folder: Path, num_timesteps: int) -> Path:
    """The file of VecNormalize's statistics that SB3's ``CheckpointCallback`` writes after so many steps."""
    return folder / f"rl_model_vecnormalize_{num_timesteps}_steps.pkl"


def drop_later_episodes(folder: Path, num_timesteps: int) -> None:
    """
    Remove from a run's monitor files the episodes after the state that it continues from: it will repeat them.

    :param folder: of the run
    :param num_timesteps: of that state
    """
    for file, episodes in monitored_episodes(folder).items():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        n_kept = int((episodes["steps"] <= num_timesteps).sum())
        with replacing(file) as path:
            path.write_text("".join(lines[: N_HEADERS + n_kept]), encoding="utf-8")


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
    Load the table of evaluations in a callback's folder, so that the callback continues it.

    :param callback: RL-Zoo's
    :param num_timesteps: later evaluations are made again
    :raises ValueError: if these had another number of episodes
    """
    assert callback.log_path is not None
    try:
        with np.load(f"{callback.log_path}.npz") as table:
            steps, results, lengths = (table[name] for name in ("timesteps", "results", "ep_lengths"))
    # NumPy and zipfile have no common error for a missing or a damaged file
    except Exception:
        return
    if results.shape[1] != callback.n_eval_episodes:
        raise ValueError(
            f"`--eval-episodes`: the evaluations of this run have {results.shape[1]} episodes each, got "
            f"{callback.n_eval_episodes}: its table of evaluations takes no other number."
        )
    callback.best_mean_reward = float(np.max(results.mean(axis=1)))
    n_kept = int((steps <= num_timesteps).sum())
    callback.evaluations_timesteps = steps[:n_kept].tolist()
    callback.evaluations_results = results[:n_kept].tolist()
    callback.evaluations_length = lengths[:n_kept].tolist()


def launch_name() -> str:
    """
    A name that all attempts of one launch share, and no other launch has.

    :return: the id that ``torchrun`` was given, or the machine and the process of ``torchrun`` itself
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return run_id if run_id != "none" else f"{socket.gethostname()} {os.getppid()}"


def mark_folder(folder: Path) -> None:
    """Note in the folder of a run which launch has made it."""
    (folder / LAUNCH_FILE).write_text(launch_name(), encoding="utf-8")


def folder_of_launch(log_path: str, env_name: str) -> Path | None:
    """
    The folder that an earlier attempt of this launch made.

    :param log_path: the runs of an algorithm
    :param env_name: the environment, as it is in the name of a run
    """
    for file in Path(log_path).glob(f"{env_name}_*/{LAUNCH_FILE}"):
        if file.read_text(encoding="utf-8") == launch_name():
            return file.parent
    return None
