"""Readers of the files that a training leaves: episodes, evaluations and what each update has logged."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pandas
from stable_baselines3.common.monitor import get_monitor_files

from sb3_trpo_ext.callbacks import EPISODES_NAME, FILE_NAME, read_rows


class Curve(NamedTuple):
    """
    Returns against environment steps, in the order of the steps.

    ``steps`` has the shape ``(n,)``; ``returns`` has the shape ``(n,)`` for episodes of training and ``(n, n_episodes)`` for
    evaluations.
    """

    steps: np.ndarray
    returns: np.ndarray


def monitored_episodes(folder: str | Path) -> dict[Path, pandas.DataFrame]:
    """
    The episodes in each monitor file of a run, with the ``steps`` of the whole training at their end.

    The environments of a ``VecEnv`` step together, so an episode that ends at the n-th step of its own environment ends at
    step n times the number of environments in all. A sum over finished episodes would leave out the unfinished ones. Episodes
    that are in no file, since ``stagger_episodes`` has cut them off, are not counted.
    """
    episodes = {Path(file): _monitored(Path(file)) for file in get_monitor_files(str(folder))}
    return {file: frame.assign(steps=frame["l"].cumsum() * len(episodes)) for file, frame in episodes.items()}


def _monitored(file: Path) -> pandas.DataFrame:
    """Returns ``r`` and lengths ``l`` of a monitor file, whatever else it has of each episode."""
    # The first line is a header in JSON
    frame = pandas.read_csv(file, skiprows=1, usecols=["r", "l"])
    # Half a line: the training was killed while it wrote
    return frame if file.read_bytes().endswith(b"\n") else frame.iloc[:-1]


def training_curve(folder: str | Path) -> Curve:
    """
    Read the episodes of training, from ``episodes.csv`` or, in runs without a ``TrainingRecorder``, from monitor files.

    :param folder: the folder of the run
    :return: the return of every finished episode; without any, an empty curve
    """
    path = Path(folder) / EPISODES_NAME
    if path.is_file():
        numbers = [(float(row["timesteps"]), float(row["r"])) for row in read_rows(path)]
    else:
        frames = monitored_episodes(folder).values()
        numbers = [pair for frame in frames for pair in zip(frame["steps"], frame["r"], strict=True)]
    steps, returns = np.array(numbers, dtype=float).reshape(-1, 2).T
    order = np.argsort(steps, kind="stable")
    return Curve(steps[order], returns[order])


def evaluation_curve(folder: str | Path) -> Curve:
    """The evaluations that were made during training; without any, an empty curve."""
    path = Path(folder) / "evaluations.npz"
    if not path.is_file():
        return Curve(np.zeros(0), np.zeros((0, 1)))
    with np.load(path) as evaluations:
        return Curve(evaluations["timesteps"], evaluations["results"])


class RunError(ValueError):
    """A run that cannot be read; the text says in one line which file, and why."""


class Run(NamedTuple):
    """
    What a run has left in its folder.

    ``updates`` has a row for each update and columns such as ``kl_divergence_loss``, ``time/rollout`` and ``timesteps``;
    everything may be empty, but not all of it.
    """

    folder: Path
    env_id: str | None
    episodes: Curve
    evaluations: Curve
    updates: pandas.DataFrame
    settings: dict[str, Any]

    @property
    def label(self) -> str:
        """A short name for a legend."""
        return f"{self.folder.parent.name}/{self.folder.name}" if self.folder.parent.name else self.folder.name


@contextmanager
def _reading(path: Path | str) -> Iterator[None]:
    """Turn any error into a :class:`RunError` that names the file."""
    try:
        yield
    # Pandas, NumPy and zipfile have no common error for a damaged file
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(f"{path} is empty or damaged: {reason}") from error


@dataclass(frozen=True)
class PythonObject:
    """A Python object in a file, of which only the name is read."""

    name: str


def read_settings(path: Path) -> dict[str, Any]:
    """
    Read ``config.yml`` or ``args.yml`` of RL-Zoo, without running what a stranger may have put there.

    :param path: the file
    :return: its content, with a :class:`PythonObject` for a class or a function; empty if the file is missing or damaged
    """
    if not path.is_file():
        return {}
    # Here, so that a run without RL-Zoo's files can be read without PyYAML
    import yaml

    class Loader(yaml.SafeLoader):
        """Knows the Python types that RL-Zoo writes, and names others."""

    prefix = "tag:yaml.org,2002:python/"
    ordered_dict, tuple_ = f"{prefix}object/apply:collections.OrderedDict", f"{prefix}tuple"
    Loader.add_constructor(ordered_dict, lambda loader, node: dict(*loader.construct_sequence(node, deep=True)))
    Loader.add_constructor(tuple_, lambda loader, node: tuple(loader.construct_sequence(node, deep=True)))
    Loader.add_multi_constructor(prefix, lambda loader, suffix, node: PythonObject(suffix))
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def has_objects(value: Any) -> bool:
    """Whether there is a :class:`PythonObject` in what :func:`read_settings` returns, or in a part of it."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return isinstance(value, PythonObject) or any(map(has_objects, parts))


def read_run(folder: str | Path) -> Run:
    """
    Read what there is of a run: monitor files, ``evaluations.npz``, ``progress.csv``.

    :param folder: the folder of the run, such as ``logs/trpo_ext/Hopper-v5_1``
    :return: the run
    :raises RunError: if there is no such folder, if nothing is in it, or if one of its files cannot be read
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise RunError(f"there is no run in {folder}: that is not a folder")
    # RL-Zoo's, in a folder that is named after the environment
    settings = read_settings(next(folder.glob("*/config.yml"), folder / "config.yml"))
    with _reading(f"a monitor file in {folder}"):
        env_id = _env_id(folder)
    episodes, evaluations = read_curves(folder)
    updates = read_updates(folder)
    if len(episodes.steps) + len(evaluations.steps) + len(updates) == 0:
        raise RunError(f"there is no run in {folder}: no episode in monitor files, no evaluations.npz, no {FILE_NAME}")
    return Run(folder, env_id, episodes, evaluations, updates, settings)


def read_curves(folder: Path) -> tuple[Curve, Curve]:
    """
    Read the returns of a run, those of the training and those of its evaluations.

    :param folder: the folder of the run
    :return: two curves, which may be empty
    :raises RunError: if a file is damaged
    """
    with _reading(f"{EPISODES_NAME} or a monitor file in {folder}"):
        episodes = training_curve(folder)
    with _reading(folder / "evaluations.npz"):
        return episodes, evaluation_curve(folder)


def read_updates(folder: Path) -> pandas.DataFrame:
    """
    Read what each update has logged.

    :param folder: the folder of the run
    :return: a row for each update; no rows if there is no table
    :raises RunError: if the table is empty or damaged
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return pandas.DataFrame({"timesteps": []})
    with _reading(path):
        table = pandas.read_csv(path, on_bad_lines="error")
        if not path.read_bytes().endswith(b"\n"):
            # Half a line: the training was killed while it wrote
            table = table.iloc[:-1]
        table = table.rename(columns=lambda name: str(name).removeprefix("train/"))
        if "time/total_timesteps" not in table:
            raise ValueError(f"it has no column time/total_timesteps, only {list(table)[:5]}")
        table["timesteps"] = table["time/total_timesteps"].astype(float)
    # A training that was resumed from an earlier state repeats some timesteps: the later rows are those of the agent
    later = table["timesteps"][::-1].cummin()[::-1].shift(-1)
    return table[~(table["timesteps"] >= later)].reset_index(drop=True)


def latest_run(folder: Path, env_name: str, models: Sequence[str]) -> int:
    """
    The number of the latest run that has a model; a start that failed and a search for hyperparameters leave none.

    :param folder: the runs of an algorithm, such as ``logs/trpo_ext``
    :param env_name: the environment, as it is in the name of a run
    :param models: names of files, with wildcards: the run has one of these
    :return: 3 for ``Hopper-v5_3``
    :raises RunError: if there is no such run
    """
    runs = {}
    for path in folder.glob("*"):
        if match := re.fullmatch(rf"{re.escape(env_name)}_(\d+)", path.name):
            runs[int(match[1])] = path
    with_model = [number for number, path in runs.items() if any(list(path.glob(name)) for name in models)]
    if with_model:
        return max(with_model)
    with_uuid = [path.name for path in folder.glob("*") if re.fullmatch(rf"{re.escape(env_name)}_\d+_.+", path.name)]
    if with_uuid:
        raise RunError(
            f"no run of {env_name} in {folder} has {' or '.join(models)} but those with a --uuid, which RL-Zoo does not find: "
            f"rename {with_uuid[0]} to {with_uuid[0].rpartition('_')[0]}"
        )
    if not runs:
        raise RunError(f"there is no run of {env_name} in {folder}: is it in another --folder, or of another --algo?")
    found = sorted({model.name for path in runs.values() for model in path.glob("*.zip")})
    hint = f"there are only {', '.join(found[:5])}" if found else "no training has finished or saved a checkpoint"
    raise RunError(f"no run of {env_name} in {folder} has {' or '.join(models)}: {hint}")


def reward_threshold(env_id: str | None) -> float | None:
    """The return at which the registry calls a task solved; ``None`` if it does not know the task or has no threshold."""
    spec = gym.registry.get(env_id) if env_id else None
    return None if spec is None else spec.reward_threshold


def _env_id(folder: Path) -> str | None:
    """The task of a run, from a monitor file or from the name of the folder; ``None`` if neither names it."""
    for file in get_monitor_files(str(folder)):
        with open(file, encoding="utf-8") as lines:
            env_id = json.loads(lines.readline().lstrip("#")).get("env_id")
        if env_id not in (None, "None"):
            return str(env_id)
    match = re.fullmatch(r"(.+-v\d+)(_\d+)?(_[0-9a-f-]{36})?", folder.name)
    return match[1] if match else None
