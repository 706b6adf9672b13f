"""The record of a training: one row for each update, whatever happens."""

import csv
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import pytest
from agents import UpdateLog, make_model, random_vec_env
from gymnasium.wrappers import TimeLimit
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor

from sb3_trpo_ext import TrainingRecorder
from sb3_trpo_ext.callbacks import COLUMNS, EVALUATION, TimedEvalCallback, read_rows
from sb3_trpo_ext.zoo.runs import monitored_episodes, training_curve


class Crash(BaseCallback):
    """Raises an error in some step, as an environment might."""

    def __init__(self, n_steps: int) -> None:
        super().__init__()
        self.n_steps = n_steps

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.n_steps:
            raise RuntimeError("out of order")
        return True


def rows_of(folder: Path) -> list[dict[str, str]]:
    """What is in the file, without help of the recorder's own reader."""
    with (folder / "progress.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("log_interval", [1, 3, None])
def test_every_update_has_a_row_with_what_it_logged(log_interval: int | None, tmp_path: Path) -> None:
    log = UpdateLog()
    make_model().learn(100, callback=[log, TrainingRecorder(tmp_path)], log_interval=log_interval)  # type: ignore[arg-type]
    rows = rows_of(tmp_path)
    assert tuple(rows[0])[: len(COLUMNS)] == COLUMNS
    # The last update is there as well, which SB3's own log leaves out
    assert [int(row["time/total_timesteps"]) for row in rows] == [32, 64, 96, 128]
    assert len(log.updates) == 4
    for row, update in zip(rows, log.updates, strict=True):
        assert float(row["train/kl_divergence_loss"]) == update["train/kl_divergence_loss"]
        assert (row["train/status"], row["train/status_name"]) == ("0", "accepted")
        assert update["train/status"] == 0
        assert float(row["time/policy_update"]) + float(row["time/critic_update"]) < float(row["time/update"])
    elapsed = [float(row["time/time_elapsed"]) for row in rows]
    spent = [float(row["time/rollout"]) + float(row["time/update"]) for row in rows]
    assert all(later > earlier for earlier, later in itertools.pairwise(elapsed))
    assert 0 < sum(spent) <= elapsed[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["episodes.csv", "progress.csv"]


def test_episodes_are_averaged_as_sb3_does(tmp_path: Path) -> None:
    env = random_vec_env(2)
    env.envs = [Monitor(one) for one in env.envs]
    model = make_model(env).learn(64, callback=TrainingRecorder(tmp_path))
    row = rows_of(tmp_path)[-1]
    assert model.ep_info_buffer is not None
    returns = [info["r"] for info in model.ep_info_buffer]
    assert len(returns) == 6
    assert float(row["rollout/ep_rew_mean"]) == pytest.approx(sum(returns) / 6)
    assert float(row["rollout/ep_len_mean"]) == 10


class Ends(BaseCallback):
    """The timesteps at the end of each episode, and its return and length."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, float, int]] = []

    def _on_step(self) -> bool:
        episodes = [info["episode"] for info in self.locals["infos"] if "episode" in info]
        self.seen += [(self.model.num_timesteps, episode["r"], episode["l"]) for episode in episodes]
        return True


def episodes_of(folder: Path) -> list[tuple[int, float, int]]:
    """What is in the file of episodes."""
    with (folder / "episodes.csv").open(newline="") as file:
        return [(int(row["timesteps"]), float(row["r"]), int(row["l"])) for row in csv.DictReader(file)]


def test_episodes_have_the_timesteps_of_the_training(tmp_path: Path) -> None:
    """Also where episodes have been cut off, so that the sum of their lengths is less."""
    env = make_vec_env(lambda: TimeLimit(gym.make("Pendulum-v1").unwrapped, 50), 4, seed=0, monitor_dir=str(tmp_path))
    ends = Ends()
    model = make_model(env, n_steps=20, batch_size=80, stagger_episodes=True)
    model.learn(1600, callback=[ends, TrainingRecorder(tmp_path)])
    assert episodes_of(tmp_path) == ends.seen
    curve = training_curve(tmp_path)
    assert curve.steps.tolist() == [steps for steps, _, _ in ends.seen]
    assert curve.returns.tolist() == [total for _, total, _ in ends.seen]
    # The monitor files do not know of what was cut off
    sums = [steps for frame in monitored_episodes(tmp_path).values() for steps in frame["steps"]]
    assert sorted(sums) != curve.steps.tolist()


def test_episodes_after_the_checkpoint_are_made_again(tmp_path: Path) -> None:
    env = random_vec_env(2)
    env.envs = [Monitor(one) for one in env.envs]
    model = make_model(env).learn(60, callback=TrainingRecorder(tmp_path))
    before = episodes_of(tmp_path)
    assert [steps for steps, _, _ in before] == [20, 20, 40, 40, 60, 60]
    model.num_timesteps = 40
    with (tmp_path / "episodes.csv").open("a") as file:
        file.write("6")
    model.learn(30, callback=TrainingRecorder(tmp_path), reset_num_timesteps=False)
    after = episodes_of(tmp_path)
    assert after[:4] == before[:4]
    assert all(40 < steps <= 40 + 64 for steps, _, _ in after[4:])
    assert len(after) > 4


def test_without_episodes_the_means_are_empty(tmp_path: Path) -> None:
    make_model(n_steps=8, batch_size=8).learn(8, callback=TrainingRecorder(tmp_path))
    assert rows_of(tmp_path)[0]["rollout/ep_rew_mean"] == ""


def test_other_on_policy_algorithms_are_recorded(tmp_path: Path) -> None:
    model = PPO("MlpPolicy", random_vec_env(2), n_steps=16, batch_size=16, device="cpu", seed=0)
    model.learn(64, callback=TrainingRecorder(tmp_path))
    rows = rows_of(tmp_path)
    assert len(rows) == 2
    assert float(rows[-1]["train/approx_kl"]) == model.logger.name_to_value["train/approx_kl"]


def test_off_policy_algorithms_are_refused(tmp_path: Path) -> None:
    model = SAC("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu")
    with pytest.raises(ValueError, match="on-policy algorithm, got SAC"):
        model.learn(10, callback=TrainingRecorder(tmp_path))


def test_crash_leaves_the_updates_before_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of order"):
        make_model().learn(1000, callback=[TrainingRecorder(tmp_path), Crash(70)])
    assert [row["time/total_timesteps"] for row in rows_of(tmp_path)] == ["32", "64"]


def test_update_that_was_not_made_has_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RL-Zoo tells its first callback that training is over, also when an update has failed."""
    model, recorder = make_model(), TrainingRecorder(tmp_path)
    model.learn(32, callback=recorder)

    def fail() -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "train", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.learn(32, callback=recorder, reset_num_timesteps=False)
    recorder.on_training_end()
    recorder.on_training_end()
    assert [row["time/total_timesteps"] for row in rows_of(tmp_path)] == ["32"]


def test_continued_training_appends_and_a_half_line_goes(tmp_path: Path) -> None:
    model = make_model()
    model.learn(64, callback=TrainingRecorder(tmp_path))
    before = rows_of(tmp_path)
    with (tmp_path / "progress.csv").open("a") as file:
        file.write("96,1.5,0.")
    model.learn(32, callback=TrainingRecorder(tmp_path), reset_num_timesteps=False)
    rows = rows_of(tmp_path)
    assert rows[:2] == before
    assert [row["time/total_timesteps"] for row in rows] == ["32", "64", "96"]
    assert float(rows[2]["time/time_elapsed"]) > float(rows[1]["time/time_elapsed"])


def test_rows_after_the_checkpoint_are_made_again(tmp_path: Path) -> None:
    model = make_model()
    model.learn(64, callback=TrainingRecorder(tmp_path))
    model.save(tmp_path / "checkpoint")
    model.learn(64, callback=TrainingRecorder(tmp_path), reset_num_timesteps=False)
    before = rows_of(tmp_path)
    assert len(before) == 4
    again = type(model).load(tmp_path / "checkpoint", env=model.get_env(), device="cpu")
    again.learn(32, callback=TrainingRecorder(tmp_path), reset_num_timesteps=False)
    rows = rows_of(tmp_path)
    assert rows[:2] == before[:2]
    assert [row["time/total_timesteps"] for row in rows] == ["32", "64", "96"]


def test_new_training_starts_a_new_file(tmp_path: Path) -> None:
    for _ in range(2):
        make_model().learn(32, callback=TrainingRecorder(tmp_path))
    assert len(rows_of(tmp_path)) == 1


def test_later_columns_are_added(tmp_path: Path) -> None:
    class Extra(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            if self.num_timesteps > 32:
                self.logger.record('train/a, "b"', self.num_timesteps)

    make_model().learn(64, callback=[Extra(), TrainingRecorder(tmp_path)], log_interval=None)  # type: ignore[arg-type]
    assert [row['train/a, "b"'] for row in rows_of(tmp_path)] == ["", "64"]


def test_without_a_folder_the_loggers_is_taken(tmp_path: Path) -> None:
    model = make_model()
    model.set_logger(configure(str(tmp_path / "log"), ["json"]))
    model.learn(32, callback=TrainingRecorder())
    assert len(rows_of(tmp_path / "log")) == 1


def test_two_writers_of_one_file_are_refused(tmp_path: Path) -> None:
    model = make_model()
    model.set_logger(configure(str(tmp_path), ["csv"]))
    with pytest.raises(ValueError, match=r"logger writes .*progress\.csv already"):
        model.learn(32, callback=TrainingRecorder(tmp_path))


@pytest.mark.parametrize("log_interval", [1, None])
@pytest.mark.parametrize("is_recorder_first", [True, False])
@pytest.mark.parametrize(("eval_freq", "n_evaluations"), [(12, [2, 3, 3, 2]), (48, [0, 1, 1, 0])])
def test_evaluations_are_no_part_of_the_rollout(
    eval_freq: int,
    n_evaluations: list[int],
    is_recorder_first: bool,
    log_interval: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = 0.0

    def evaluate(*_: Any, **__: Any) -> tuple[list[float], list[int]]:
        nonlocal clock
        clock += 100.0
        return [1.0], [10]

    class Dump(BaseCallback):
        """A step takes a second; some write and thereby clear the log, as those of `LogEveryNTimesteps` do."""

        def _on_step(self) -> bool:
            nonlocal clock
            clock += 1.0
            if self.num_timesteps % 20 == 0:
                self.logger.dump(self.num_timesteps)
            return True

    monkeypatch.setattr("sb3_trpo_ext.callbacks.time", SimpleNamespace(perf_counter=lambda: clock))
    monkeypatch.setattr("stable_baselines3.common.callbacks.evaluate_policy", evaluate)
    evaluation = TimedEvalCallback(random_vec_env(1), eval_freq=eval_freq, n_eval_episodes=1, verbose=0)
    callbacks: list[BaseCallback] = [TrainingRecorder(tmp_path), evaluation, Dump()]
    callbacks = callbacks if is_recorder_first else callbacks[::-1]
    make_model().learn(128, callback=callbacks, log_interval=log_interval)  # type: ignore[arg-type]
    rows = rows_of(tmp_path)
    assert [int(row["time/total_timesteps"]) for row in rows] == [32, 64, 96, 128]
    assert [float(row["time/evaluation"]) for row in rows] == [100.0 * n for n in n_evaluations]
    assert [float(row["time/rollout"]) for row in rows] == [32.0] * 4
    assert float(rows[-1]["time/time_elapsed"]) == 128 + 100 * sum(n_evaluations)


def test_without_timed_evaluations_there_is_no_column(tmp_path: Path) -> None:
    make_model().learn(32, callback=TrainingRecorder(tmp_path))
    assert EVALUATION not in rows_of(tmp_path)[0]


@pytest.mark.parametrize("folder", [3, True, ["a"]])
def test_folder_must_be_a_path(folder: Any) -> None:
    with pytest.raises(ValueError, match="`folder` must be a path or None"):
        TrainingRecorder(folder)


def test_bad_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"`folder`: cannot write .*\(File exists\)"):
        make_model().learn(32, callback=TrainingRecorder(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"`folder`: cannot write .*\(Not a directory\)"):
        make_model().learn(32, callback=TrainingRecorder(tmp_path / "file" / "within"))


@pytest.mark.parametrize("text", ["", "a,b", "a,b\n", "a,b\n1,2,3\n", "a,b\n1,"])
def test_reader_skips_what_is_no_row(text: str, tmp_path: Path) -> None:
    (tmp_path / "progress.csv").write_text(text)
    assert read_rows(tmp_path / "progress.csv") == []


def test_tensorboard_gets_the_hyperparameters(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    plugin = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
    model = make_model(tensorboard_log=str(tmp_path), gamma=0.9, ent_coef=lambda progress: 0.1 * progress)
    model.learn(100, callback=TrainingRecorder(tmp_path))
    (folder,) = tmp_path.glob("TRPO_*")
    events = accumulator.EventAccumulator(str(folder)).Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = plugin.HParamsPluginData.FromString(content).session_start_info.hparams
    assert values["gamma"].number_value == 0.9
    assert values["target_kl"].number_value == 0.05
    assert values["n_envs"].number_value == model.n_envs
    # A function has no place in the table
    assert "ent_coef" not in values
    assert "rollout/ep_rew_mean" in events.Tags()["scalars"]
