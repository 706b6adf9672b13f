"""The record of a training: one row of a CSV file for each update, and of another one for each episode."""

import csv
import inspect
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.logger import CSVOutputFormat, HParam, TensorBoardOutputFormat
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_trpo_ext._files import replacing

FILE_NAME = "progress.csv"
EPISODES_NAME = "episodes.csv"
#: Of an episode: the timesteps of the training at its end, and what ``Monitor`` calls its return and its length.
EPISODE_COLUMNS = ("timesteps", "r", "l")
#: The first columns, under SB3's names; what the logger has comes after these.
COLUMNS = (
    "time/total_timesteps",
    "time/time_elapsed",
    "time/rollout",
    "time/update",
    "rollout/ep_rew_mean",
    "rollout/ep_len_mean",
)
#: The logger's key for the seconds of evaluations.
EVALUATION = "time/evaluation"


class TimedEvalCallback(EvalCallback):
    """SB3's ``EvalCallback`` that also logs, as ``time/evaluation``, the seconds of a rollout that went into evaluations."""

    _seconds = 0.0

    def _on_rollout_start(self) -> None:
        self._seconds = 0.0

    def _on_step(self) -> bool:
        started = time.perf_counter()
        continue_training = super()._on_step()
        if self.eval_freq > 0 and self.n_calls % self.eval_freq == 0:
            self._seconds += time.perf_counter() - started
        # In every step: an evaluation writes the log, which clears it, and so may other callbacks
        self.logger.record(EVALUATION, self._seconds, exclude="stdout")
        return continue_training


class TrainingRecorder(BaseCallback):
    """
    Writes ``progress.csv``: for each update the timesteps, the recent episodes, and what is logged under train/ and time/.

    SB3 writes its log between a rollout and the update on it, and never writes the last update. Here every update has its own
    row, written when it is over, whatever the logger does with it. A continued training (``num_timesteps`` is not zero when it
    starts) appends to the file; a new one starts a new file, as SB3's ``Monitor`` does.

    ``time/rollout`` and ``time/update`` are the seconds that the rollout and the update took. The evaluations of
    :class:`TimedEvalCallback`, which ``sb3-trpo train`` makes, are left out of the rollout and have their own
    ``time/evaluation``; those of SB3's ``EvalCallback`` count as part of it.

    ``episodes.csv`` in the same folder has a row for each episode of an environment with a ``Monitor``: the timesteps of the
    training at its end, its return and its length. Monitor files have no timesteps, and adding up their episode lengths misses
    episodes that ``stagger_episodes`` cut off and steps of other processes. Environments of tensors write no rows.

    Where SB3 logs to TensorBoard, its tab of hyperparameters gets the arguments of the model.

    :param folder: where to write. None: the folder of the run under ``sb3-trpo train``, else the logger's folder
    :param verbose: 1 to say where the file is
    :raises ValueError: if the folder is not a path
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, verbose: int = 0) -> None:
        super().__init__(verbose)
        if folder is not None and not isinstance(folder, (str, os.PathLike)):
            raise ValueError(f"`folder` must be a path or None, got {folder!r}.")
        self.folder = None if folder is None else Path(folder)
        self._columns: list[str] = []
        # What is known of an update before it is over; None if no update is expected
        self._row: dict[str, Any] | None = None
        self._n_updates_before = 0

    @property
    def path(self) -> Path:
        """The file; without a folder, it is known when the callback has a model."""
        return (Path(self.logger.get_dir() or ".") if self.folder is None else self.folder) / FILE_NAME

    @property
    def _episodes_path(self) -> Path:
        return self.path.with_name(EPISODES_NAME)

    def _on_step(self) -> bool:
        infos = self.locals.get("infos", ())
        # Those of environments of tensors would have to be fetched from the device in every step
        episodes = [info["episode"] for info in infos if "episode" in info] if isinstance(infos, (list, tuple)) else []
        if episodes:
            rows = [(self.model.num_timesteps, episode["r"], episode["l"]) for episode in episodes]
            with self._episodes_path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows)
        return True

    def _on_training_start(self) -> None:
        """
        Start the files, or continue those that are there.

        :raises ValueError: if the folder cannot be made, if SB3's logger writes the same file, or if there are no updates
        """
        if not isinstance(self.model, OnPolicyAlgorithm):
            raise ValueError(f"`TrainingRecorder` records updates of an on-policy algorithm, got {type(self.model).__name__}.")
        path = self.path
        for output in self.logger.output_formats:
            if isinstance(output, CSVOutputFormat) and os.path.abspath(output.file.name) == str(path.absolute()):
                raise ValueError(f"`folder`: SB3's logger writes {path} already: pass another folder, or log no CSV there.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            rows, episodes, n_timesteps = [], [], self.model.num_timesteps
            if n_timesteps > 0:
                rows = [row for row in read_rows(path) if self._is_past(row)]
                # An episode that ended with the last step of a checkpoint is not made again
                episodes = [row for row in read_rows(self._episodes_path) if int(row["timesteps"]) <= n_timesteps]
            self._columns = list(dict.fromkeys([*COLUMNS, *(rows[0] if rows else ())]))
            _write_rows(path, self._columns, rows)
            _write_rows(self._episodes_path, EPISODE_COLUMNS, episodes)
        except OSError as error:
            raise ValueError(f"`folder`: cannot write {path} ({error.strerror}): pass another folder.") from error
        if self.verbose > 0:
            print(f"Updates are recorded in {path}")
        if any(isinstance(output, TensorBoardOutputFormat) for output in self.logger.output_formats):
            # TensorBoard needs a metric by which it compares runs; the value here is not shown
            table = HParam(self._hyperparameters(), {"rollout/ep_rew_mean": 0.0})
            self.logger.record("hparams", table, exclude=("stdout", "log", "json", "csv"))
        self._phase_started = time.perf_counter()
        # A continued training has already lasted for some time
        self._started = self._phase_started - float(rows[-1].get("time/time_elapsed") or 0 if rows else 0)
        self._row = None

    def _on_rollout_start(self) -> None:
        self._finish_row()
        self._phase_started = time.perf_counter()

    def _on_rollout_end(self) -> None:
        now = time.perf_counter()
        evaluation = self.logger.name_to_value.get(EVALUATION)
        seconds = now - self._phase_started - (evaluation or 0.0)
        self._row = {"time/total_timesteps": self.model.num_timesteps, "time/rollout": seconds}
        if evaluation is not None:
            self._row[EVALUATION] = evaluation
        episodes = [info for info in self.model.ep_info_buffer or () if "r" in info]
        if episodes:
            self._row["rollout/ep_rew_mean"] = float(np.mean([info["r"] for info in episodes]))
            self._row["rollout/ep_len_mean"] = float(np.mean([info["l"] for info in episodes]))
        self._phase_started = now
        self._n_updates_before = self._n_updates()

    def _on_training_end(self) -> None:
        # RL-Zoo calls this a second time, and after an error as well: then no update is expected, or none was made
        self._finish_row()

    def _hyperparameters(self) -> dict[str, bool | str | float | None]:
        """The arguments of the model that are numbers or text: TensorBoard takes no others."""
        names = ["n_envs", *inspect.signature(type(self.model)).parameters]
        values = {name: getattr(self.model, name, None) for name in names}
        return {name: value for name, value in values.items() if isinstance(value, bool | str | float | int)}

    def _n_updates(self) -> int:
        return int(getattr(self.model, "_n_updates", 0))

    def _is_past(self, row: dict[str, str]) -> bool:
        """Whether the model has had an update: those after the checkpoint from which a training continues are made again."""
        # A checkpoint at the last step of a rollout does not have its update yet
        if n_updates := row.get("train/n_updates"):
            return int(n_updates) <= self._n_updates()
        return float(row.get("time/total_timesteps") or 0) <= self.model.num_timesteps

    def _finish_row(self) -> None:
        """Write what the update has logged, if there was one."""
        row, self._row = self._row, None
        if row is None or self._n_updates() == self._n_updates_before:
            return
        now = time.perf_counter()
        row |= {"time/update": now - self._phase_started, "time/time_elapsed": now - self._started}
        logged = {key: value for key, value in self.logger.name_to_value.items() if key.startswith(("train/", "time/"))}
        row = {**logged, **row}
        new_columns = [key for key in row if key not in self._columns]
        if new_columns:
            # Rare: an algorithm usually logs the same keys in every update
            rows = read_rows(self.path)
            self._columns += new_columns
            _write_rows(self.path, self._columns, rows)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)


def _write_rows(path: Path, columns: Sequence[str], rows: list[dict[str, str]]) -> None:
    """Write a whole CSV file."""
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The complete rows of a CSV file, as text by column: a line that a crash cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = csv.DictReader(line for line in lines if line.endswith("\n"))
    # Too many cells are under the key None, and too few have the value None
    return [row for row in rows if None not in (*row, *row.values())]
