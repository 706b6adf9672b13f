"""The report of a run: evaluation, distance walked, learning curve."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_trpo_ext.tools import plots, report
from sb3_trpo_ext.zoo import runs
from sb3_trpo_ext.zoo.command import main
from sb3_trpo_ext.zoo.resume import drop_later_episodes


class Walker(gym.Env[np.ndarray, np.int64]):
    """Walks by `stride` in every step, for one step in the first episode, two in the second and so on.

    :param stride: distance of a step
    :param start_in_info: whether `reset` reports the position
    """

    observation_space = spaces.Box(-1, 1, (1,))
    action_space = spaces.Discrete(2)

    def __init__(self, stride: float, start_in_info: bool = True) -> None:
        self.stride, self.start_in_info = stride, start_in_info
        self.episode = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode += 1
        self.n_steps = 0
        # Each episode starts somewhere else, so that a distance across two episodes would be wrong.
        self.position = 100.0 * self.episode
        return np.zeros(1, np.float32), {"x_position": self.position} if self.start_in_info else {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        self.position += self.stride
        return np.zeros(1, np.float32), 2.0, self.n_steps == self.episode, False, {"x_position": self.position}


class Idle:
    """An agent that always takes the first action."""

    def predict(self, observation: np.ndarray, **_: Any) -> tuple[np.ndarray, None]:
        return np.zeros(len(observation), dtype=int), None


def test_distance_is_of_one_episode_in_each_environment() -> None:
    vec_env = DummyVecEnv([lambda: Monitor(Walker(1.0)), lambda: Monitor(Walker(-0.5))])
    # Normalization is a wrapper with an empty list of reset infos in front of the true one.
    env = VecNormalize(vec_env, training=False, norm_reward=False)
    episodes = report.run_episodes(Idle(), env, 6, deterministic=True)  # type: ignore[arg-type]
    by_length = sorted(zip(episodes.lengths, episodes.returns, episodes.distances, strict=True))
    assert by_length == [(1, 2.0, -0.5), (1, 2.0, 1.0), (2, 4.0, -1.0), (2, 4.0, 2.0), (3, 6.0, -1.5), (3, 6.0, 3.0)]


def test_distance_counts_from_the_first_step_if_reset_does_not_tell() -> None:
    env = DummyVecEnv([lambda: Monitor(Walker(1.0, start_in_info=False))])
    episodes = report.run_episodes(Idle(), env, 3, deterministic=True)  # type: ignore[arg-type]
    assert episodes.distances == [0.0, 1.0, 2.0]


def test_no_distance_without_a_position() -> None:
    env = DummyVecEnv([lambda: Monitor(gym.make("CartPole-v1"))])
    episodes = report.run_episodes(Idle(), env, 2, deterministic=True)  # type: ignore[arg-type]
    assert len(episodes.returns) == 2
    assert episodes.distances == []


def write_monitor(folder: Path, index: int, episodes: list[tuple[float, int]], ending: str = "") -> None:
    """Write what SB3's monitor writes: return, length and time of each episode."""
    rows = [f"{total},{length},{0.01 * row}" for row, (total, length) in enumerate(episodes)]
    lines = ['#{"t_start": 0.0, "env_id": "None"}', "r,l,t", *rows]
    (folder / f"{index}.monitor.csv").write_text("\n".join(lines) + "\n" + ending, encoding="utf-8")


def test_training_curve_merges_environments_in_the_order_of_steps(tmp_path: Path) -> None:
    write_monitor(tmp_path, 0, [(1.0, 10), (2.0, 30), (3.0, 5)])
    write_monitor(tmp_path, 1, [(4.0, 35), (5.0, 7)], ending="6.0,")
    write_monitor(tmp_path, 2, [])
    curve = runs.training_curve(tmp_path)
    # Own steps 10, 40, 45 and 35, 42 of each environment, while all three have stepped.
    np.testing.assert_array_equal(curve.steps, 3 * np.array([10, 35, 40, 42, 45]))
    np.testing.assert_array_equal(curve.returns, [1, 4, 2, 5, 3])


def test_other_columns_of_a_monitor_file_make_no_difference(tmp_path: Path) -> None:
    """Pandas takes a cell that is empty, or says "None", for a number that is missing."""
    rows = ["1.0,10,0.1,", "2.0,10,0.2,None", "nan,10,0.3,x", "4.0,10,0.4,NA", "5.0,1"]
    lines = ['#{"t_start": 0.0, "env_id": "None"}', "r,l,t,winner", *rows]
    (tmp_path / "0.monitor.csv").write_text("\n".join(lines))
    curve = runs.training_curve(tmp_path)
    assert curve.steps.tolist() == [10, 20, 30, 40]
    np.testing.assert_array_equal(curve.returns, [1, 2, np.nan, 4])
    drop_later_episodes(tmp_path, 30)
    assert (tmp_path / "0.monitor.csv").read_text().splitlines() == lines[:5]


def test_curves_without_files_are_empty(tmp_path: Path) -> None:
    assert len(runs.training_curve(tmp_path).steps) == 0
    assert len(runs.evaluation_curve(tmp_path).steps) == 0


@pytest.mark.parametrize("n_episodes", [0, 1, 250])
def test_picture_of_a_long_and_a_missing_history(n_episodes: int, tmp_path: Path) -> None:
    path = tmp_path / "curve.png"
    steps = np.arange(1, n_episodes + 1)
    training = runs.Curve(10 * steps, np.sqrt(steps))
    evaluations = runs.Curve(100 * steps, np.sqrt(steps)[:, None] + [0.0, 1.0, 2.0])
    lines = plots.return_lines(training, evaluations, "black", is_single=True)
    assert len(lines) == (5 if n_episodes else 0)
    plots.draw_learning_curve(path, plots.Panel("a run", lines), 2500, [1.0, 2.0])
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def short_episodes() -> Iterator[None]:
    """Episodes of Swimmer have 100 steps instead of 1,000."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gym.spec("Swimmer-v5"), "max_episode_steps", 100)
        yield


@pytest.fixture(scope="module")
def logs(short_episodes: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run on a task with an `x_position`, normalized, with an argument of the environment and an evaluation."""
    folder = tmp_path_factory.mktemp("report") / "logs"
    main(
        [
            *("train", "--env", "Swimmer-v5", "-n", "600", "--seed", "0", "--device", "cpu", "-f", str(folder)),
            *("--eval-freq", "300", "--eval-episodes", "2", "--env-kwargs", "ctrl_cost_weight:0.5"),
            *("-params", "n_steps:300", "n_critic_updates:1", "normalize:dict(norm_obs=True,norm_reward=True)"),
        ]
    )
    return folder


def test_report_writes_figures_and_picture(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["report", "--env", "Swimmer-v5", "-f", str(logs), "--n-eval-episodes", "2", "--device", "cpu"]
    assert main(arguments) == 0
    folder = logs / "trpo_ext" / "Swimmer-v5_1"
    summary = json.loads((folder / "evaluation.json").read_text())
    assert summary["env"] == "Swimmer-v5"
    assert summary["algo"] == "trpo_ext"
    assert summary["seed"] == 1000
    assert summary["deterministic"] is True
    assert summary["n_timesteps"] == 600
    assert summary["length"]["episodes"] == [100, 100]
    for name in ("return", "length", "distance"):
        values = summary[name]["episodes"]
        assert len(values) == 2
        assert summary[name]["mean"] == pytest.approx(np.mean(values))
        assert summary[name]["std"] == pytest.approx(np.std(values))
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob(".evaluation*"))

    output = capsys.readouterr().out
    assert str(folder / "learning_curve.png") in output
    assert f"{summary['return']['mean']:,.2f} +- {summary['return']['std']:,.2f}" in output
    assert f"{summary['distance']['mean']:,.2f}" in output

    # The same again is the same, to the last bit.
    assert main(arguments) == 0
    assert json.loads((folder / "evaluation.json").read_text()) == summary


def test_evaluation_is_of_the_environment_of_training(logs: Path) -> None:
    run = report.load_run("Swimmer-v5", str(logs), seed=1000, device="cpu")
    assert isinstance(run.env, VecNormalize)
    assert not run.env.training
    assert not run.env.norm_reward
    assert run.env.get_attr("unwrapped")[0]._ctrl_cost_weight == 0.5
    statistics: Any = run.env.obs_rms
    count = statistics.count
    assert count > 600

    episodes = report.run_episodes(run.model, run.env, 1, deterministic=True)
    assert statistics.count == count
    other = report.load_run("Swimmer-v5", str(logs), seed=1000, device="cpu")
    expected, _ = evaluate_policy(other.model, other.env, 1, return_episode_rewards=True)
    assert episodes.returns == expected


def test_several_environments_share_the_episodes(logs: Path) -> None:
    run = report.load_run("Swimmer-v5", str(logs), seed=1000, device="cpu", n_envs=3)
    assert run.env.num_envs == 3
    assert isinstance(run.env.unwrapped, DummyVecEnv)
    observations = run.env.reset()
    assert isinstance(observations, np.ndarray)
    assert len(np.unique(observations, axis=0)) == 3

    episodes = report.run_episodes(run.model, run.env, 3, deterministic=True)
    assert len(set(episodes.returns)) == len(episodes.distances) == 3


def test_stochastic_episodes_are_others(logs: Path) -> None:
    path = logs / "trpo_ext" / "Swimmer-v5_1" / "evaluation.json"
    arguments = ["report", "--env", "Swimmer-v5", "-f", str(logs), "--n-eval-episodes", "1", "--device", "cpu"]
    main(arguments)
    deterministic = json.loads(path.read_text())
    main([*arguments, "--stochastic"])
    stochastic = json.loads(path.read_text())
    assert stochastic["deterministic"] is False
    assert stochastic["return"] != deterministic["return"]


def test_all_plots_gathers_our_runs(logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "gathered"
    main(["all-plots", "-e", "Swimmer-v5", "-f", str(logs), "--no-display", "-print", "-o", str(output)])
    assert "Swimmer-v5-TRPO_EXT" in capsys.readouterr().out
    assert output.with_suffix(".pkl").is_file()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--env", "Ant-v5"], "there is no run of Ant-v5 in "),
        (["--env", "Ant-v55"], "--env: there is no environment 'Ant-v55'; did you mean Ant-v5"),
        (["--env", "Swimmer-v5", "--exp-id", "7"], "Swimmer-v5_7 folder was not found"),
        (["--env", "Swimmer-v5", "--n-eval-episodes", "0"], "must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_explained(
    arguments: list[str], problem: str, logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *arguments, "-f", str(logs)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sb3-trpo report: error: ")
    assert error.count("\n") == 1
    assert problem in error


def test_arguments_of_the_environment_can_be_others(logs: Path) -> None:
    arguments = ["report", "--env", "Swimmer-v5", "-f", str(logs), "--n-eval-episodes", "1", "--device", "cpu"]
    returns = []
    for weight in ("0.5", "100.0"):
        assert main([*arguments, "--env-kwargs", f"ctrl_cost_weight:{weight}"]) == 0
        summary = json.loads((logs / "trpo_ext" / "Swimmer-v5_1" / "evaluation.json").read_text())
        returns.append(summary["return"]["mean"])
    assert returns[1] < returns[0] - 100
    # Those of training
    assert main(arguments) == 0
    assert json.loads((logs / "trpo_ext" / "Swimmer-v5_1" / "evaluation.json").read_text())["return"]["mean"] == returns[0]


def test_options_that_only_python_can_read_are_refused(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = logs / "trpo_ext" / "Swimmer-v5_1" / "Swimmer-v5" / "args.yml"
    before, made = path.read_text(), logs / "made"
    path.write_text(f"!!python/object/apply:os.mkdir ['{made}']")
    try:
        assert main(["report", "--env", "Swimmer-v5", "-f", str(logs), "--n-eval-episodes", "1"]) == 2
    finally:
        path.write_text(before)
    assert "holds what only Python can read" in capsys.readouterr().err
    assert not made.exists()
