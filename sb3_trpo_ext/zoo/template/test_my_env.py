"""The environment keeps the rules of Gymnasium and of Stable-Baselines3, and an agent can be trained in it."""

from pathlib import Path

import gymnasium as gym
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common import env_checker

from sb3_trpo_ext.zoo.command import main


def test_environment_keeps_the_rules() -> None:
    env = gym.make("my_env:MyEnv-v0").unwrapped
    check_env(env)
    env_checker.check_env(env)


def test_short_training_runs(tmp_path: Path) -> None:
    settings = str(Path(__file__).with_name("hyperparams.yml"))
    options = ["--env", "MyEnv-v0", "--gym-packages", "my_env", "--conf-file", settings, "-f", str(tmp_path)]
    assert main(["train", *options, "-n", "2048"]) == 0
    assert (tmp_path / "trpo_ext" / "MyEnv-v0_1" / "MyEnv-v0.zip").is_file()
