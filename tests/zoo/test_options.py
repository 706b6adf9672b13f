"""What `sb3-trpo` reads and completes before RL-Zoo's scripts read their options."""

import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest

from sb3_trpo_ext.zoo.command import main
from sb3_trpo_ext.zoo.options import choose_run, parse
from sb3_trpo_ext.zoo.runs import RunError, latest_run

#: A module of a user's, which registers an environment.
MODULE = """
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv

class Mine(CartPoleEnv):
    def __init__(self, length=0.5, **kwargs):
        super().__init__(**kwargs)
        self.length = length

gymnasium.register("Mine-v0", entry_point=Mine, max_episode_steps=20)
"""


# === The options of every command ===


def test_options_of_every_command_are_taken_out() -> None:
    arguments = ["--task", "A", "--verbose", "2", "--eval-freq", "-1", "--gym-packages", "a", "b", "-n", "3"]
    rest = ["--task", "A", "--eval-freq", "-1", "-n", "3"]
    options = parse("plot", arguments)
    assert (options.verbose, options.gym_packages, options.to_arguments()) == (2, ["a", "b"], rest)
    options = parse("plot", rest)
    assert (options.verbose, options.gym_packages, options.to_arguments()) == (None, None, rest)
    # Some scripts read them as well
    assert parse("enjoy", arguments).to_arguments() == [*rest, "--verbose", "2", "--gym-packages", "a", "b"]
    assert parse("compare", arguments).to_arguments() == [*rest, "--gym-packages", "a", "b"]


def test_modules_of_the_current_folder_are_found(tmp_path: Path) -> None:
    """By the installed command, where Python looks beside the command and not in the current folder."""
    (tmp_path / "my_envs.py").write_text(MODULE)
    # Shadows nothing: Python's own module is found first
    (tmp_path / "colorsys.py").write_text("raise RuntimeError")
    start = [
        sys.executable,
        "-c",
        "import sys; sys.path.remove(''); from sb3_trpo_ext.zoo.command import main; import colorsys; main()",
    ]
    train = ["train", "--env", "Mine-v0", "--gym-packages", "my_envs", "-n", "64", "--eval-freq", "-1"]
    train += ["-params", "n_envs:1", "n_steps:64", "batch_size:64"]
    result = subprocess.run([*start, *train], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "logs" / "trpo_ext" / "Mine-v0_1" / "Mine-v0.zip").is_file()


def test_environment_of_the_user_in_all_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more_envs.py").write_text(MODULE.replace("Mine", "Other"))
    path = sys.path
    mine = ["--env", "Other-v0", "--gym-packages", "more_envs"]
    small = ["-params", "n_envs:1", "n_steps:64", "batch_size:64"]
    commands = (
        ["train", *mine, "-n", "64", "--eval-freq", "-1", "--env-kwargs", "length:1.0", *small],
        ["report", *mine, "--n-eval-episodes", "1", "--env-kwargs", "length:0.1"],
        ["enjoy", *mine, "--no-render", "-n", "30"],
        ["plot", "logs/trpo_ext/Other-v0_1", "--gym-packages", "more_envs"],
    )
    for command in commands:
        # As each command would find it, in a process of its own
        gym.registry.pop("Other-v0", None)
        sys.modules.pop("more_envs", None)
        assert main(command) == 0, capsys.readouterr().err
    assert sys.path is path
    gym.registry.pop("Other-v0", None)


# === The latest run ===


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """Runs of A-v0 of which one has ended, one has checkpoints, one a best agent, and one was a start that failed."""
    files = {
        "A-v0_2": ["A-v0.zip", "best_model.zip", "rl_model_100_steps.zip"],
        "A-v0_10": ["rl_model_100_steps.zip", "rl_model_200_steps.zip"],
        "A-v0_11": ["best_model.zip"],
        "A-v0_12": [],
        "A-v0_x": ["A-v0.zip"],
        "BA-v0_13": ["A-v0.zip"],
        "C-v0_1": [],
    }
    for run, names in files.items():
        (tmp_path / "trpo_ext" / run / "A-v0").mkdir(parents=True)
        for name in names:
            (tmp_path / "trpo_ext" / run / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "options", "number"),
    [
        ("enjoy", [], 2),
        ("record-video", [], 2),
        ("enjoy", ["--load-best"], 11),
        ("enjoy", ["--load-checkpoint", "100"], 10),
        ("record-video", ["--load-checkpoint", "200"], 10),
        ("enjoy", ["--load-last-checkpoint"], 10),
        ("record-training", [], 11),
    ],
)
def test_latest_run_with_the_model_is_taken(name: str, options: list[str], number: int, logs: Path) -> None:
    for exp_id in ([], ["--exp-id", "0"]):
        given = parse(name, ["--algo", "trpo_ext", "--folder", str(logs), "--env", "A-v0", *options, *exp_id])
        choose_run(given)
        assert given.exp_id == number
        assert given.to_arguments()[given.to_arguments().index("--exp-id") + 1] == str(number)


@pytest.mark.parametrize("options", [["--exp-id", "3"], ["--exp-id", "-1"], ["--folder", "rl-trained-agents"]])
def test_chosen_run_and_downloaded_agents_are_left_alone(options: list[str], logs: Path) -> None:
    given = parse("enjoy", ["--algo", "trpo_ext", "--folder", str(logs), "--env", "A-v0", *options])
    before = given.to_arguments()
    choose_run(given)
    assert given.to_arguments() == before


def test_missing_model_is_explained(logs: Path) -> None:
    folder = logs / "trpo_ext"
    with pytest.raises(RunError, match=r"there is no run of D-v0 in .*trpo_ext: is it in another --folder"):
        latest_run(folder, "D-v0", ["D-v0.zip"])
    with pytest.raises(RunError, match=r"no run of C-v0 in .* has C-v0\.zip: no training has finished or"):
        latest_run(folder, "C-v0", ["C-v0.zip"])
    with pytest.raises(RunError, match=r"has rl_model_7_steps\.zip: there are only A-v0\.zip, best_model\.zip, rl_model_100"):
        latest_run(folder, "A-v0", ["rl_model_7_steps.zip"])


def test_runs_that_rl_zoo_does_not_find_are_named(logs: Path) -> None:
    folder = logs / "trpo_ext"
    (folder / "C-v0_2_4b5e").mkdir()
    with pytest.raises(RunError, match=r"those with a --uuid.*: rename C-v0_2_4b5e to C-v0_2"):
        latest_run(folder, "C-v0", ["C-v0.zip"])


def test_folders_of_failed_starts_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    train = ["train", "--env", "CartPole-v1", "-n", "64", "--eval-freq", "-1", "--device", "cpu"]
    assert main([*train, "-params", "n_envs:1", "n_steps:64", "batch_size:64"]) == 0
    assert main([*train, "--device", "gpu"]) == 2
    assert (tmp_path / "logs" / "trpo_ext" / "CartPole-v1_2").is_dir()
    for command in (["enjoy", "--no-render", "-n", "10"], ["report", "--n-eval-episodes", "1"]):
        capsys.readouterr()
        assert main([*command, "--env", "CartPole-v1"]) == 0
        assert "CartPole-v1_1" in capsys.readouterr().out
