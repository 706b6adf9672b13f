"""Every example runs as a user would run it, with the settings that it claims; the slow tests check that they learn."""

import ast
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch as th
import yaml
from stable_baselines3.common import evaluation
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from test_architecture import count_code_lines

import sb3_trpo_ext
from sb3_trpo_ext.update import distributions

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples"
#: Steps for an update or more, and less than the return of an agent that has learned nothing.
BUDGETS = {
    "cartpole": (2048, 8),
    "continue_contrib": (2048, -2000),
    "custom_distribution": (2048, -2000),
    "dict_observation": (512, -120),
    "entropy_bonus": (2048, 8),
    "humanoid": (4096, 50),
    "kl_penalty": (2048, 8),
    "masks": (2048, 15),
    "memory": (2048, 8),
    "mixed_actions": (2048, 3),
    "onnx": (2048, -2000),
    "pendulum": (2048, -2000),
    "point_mass": (4800, None),
    "pretrain": (1024, 30),
    "squashed_policy": (2048, -2000),
    "tensors": (2048, 8),
    "vector_env": (2048, -2000),
}
#: A return that is not reached by chance, after the default number of steps; that of seed 0 in the comment.
THRESHOLDS = {
    "cartpole": 475,  # 500
    "continue_contrib": -300,  # -164
    "custom_distribution": -400,  # -236
    "dict_observation": -3,  # 0
    "entropy_bonus": 400,  # 500 and 500
    "kl_penalty": 475,  # 500 and 500
    "masks": 45,  # 61
    "memory": 400,  # 500
    "mixed_actions": 16,  # 17.9
    "onnx": -300,
    "pendulum": -300,  # -160
    "pretrain": 475,  # 500
    "squashed_policy": -400,  # -243
    "tensors": 475,  # 500
    "vector_env": -300,  # -193
}
FIGURES = ("kl_penalty", "point_mass")
#: Examples with the settings of an entry in hyperparams/trpo_ext.yml.
ENTRIES = {"humanoid": "Humanoid-v5", "point_mass": "sb3_trpo_ext/PointMass1D-v0"}


@pytest.fixture(autouse=True)
def _no_family_stays() -> Iterator[None]:
    before = dict(distributions._FAMILIES)
    yield
    distributions._FAMILIES.clear()
    distributions._FAMILIES.update(before)


class Stopped(Exception):
    """Ends an example where its training would start."""


class Model:
    """Takes the place of TRPO, and keeps what an example passes."""

    made: ClassVar["Model"]

    def __init__(self, policy: str, env: VecEnv, **settings: Any) -> None:
        self.policy, self.env, self.settings = policy, env, settings
        Model.made = self

    def learn(self, total_timesteps: int, **_: Any) -> None:
        self.total_timesteps = total_timesteps
        raise Stopped


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")


def value_of(setting: Any) -> Any:
    """A setting of RL-Zoo or of an example in a form that can be compared: schedules by their values."""
    if isinstance(setting, str) and setting.startswith("lin_"):
        setting = LinearSchedule(float(setting.removeprefix("lin_")), 0.0, 1.0)
    elif isinstance(setting, str) and setting.startswith("dict("):
        return eval(setting)
    return [setting(progress) for progress in (1.0, 0.5, 0.0)] if callable(setting) else setting


@pytest.mark.parametrize("name", ENTRIES)
def test_example_has_the_settings_of_the_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sb3_trpo_ext, "TRPO", Model)
    with pytest.raises(Stopped):
        run(name, tmp_path, monkeypatch)
    model = Model.made
    assert isinstance(model.env, VecNormalize)
    entry = yaml.safe_load((ROOT / "hyperparams" / "trpo_ext.yml").read_text())[ENTRIES[name]]
    assert model.policy == entry.pop("policy")
    assert model.env.num_envs == entry.pop("n_envs")
    assert model.total_timesteps == entry.pop("n_timesteps")
    normalize = entry.pop("normalize")
    expected = {"norm_obs": True, "norm_reward": True} if normalize is True else value_of(normalize)
    assert {"norm_obs": model.env.norm_obs, "norm_reward": model.env.norm_reward} == expected
    # RL-Zoo gives the discount factor to the wrapper too
    assert model.env.gamma == entry.get("gamma", 0.99)
    settings = {name: value_of(setting) for name, setting in model.settings.items()}
    # What is not a setting of the task
    for option in ("seed", "verbose", "stats_window_size"):
        settings.pop(option, None)
    assert settings == {name: value_of(setting) for name, setting in entry.items()}


def returns_in(output: str) -> list[float]:
    return [float(number) for number in re.findall(r"mean return[^:]*: (-?[\d.]+)", output)]


def test_every_example_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {*BUDGETS, "atari"}


@pytest.mark.parametrize("name", [*BUDGETS, "atari"])
def test_example_is_short_and_uses_the_public_names_alone(name: str) -> None:
    source = (FOLDER / f"{name}.py").read_text()
    # The point mass draws four pictures
    assert count_code_lines(source) < (90 if name == "point_mass" else 60)
    if name != "point_mass":
        assert len(source.splitlines()) <= 60
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.module == "sb3_trpo_ext.envs" or not (node.module or "").startswith("sb3_trpo_ext.")
        # `_build` and `_on_...` are what a subclass of SB3's classes defines; nothing else with an underscore is used
        if isinstance(node, ast.Attribute) and node.attr != "_build":
            assert not node.attr.startswith("_"), node.attr


@pytest.mark.parametrize("name", BUDGETS)
def test_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    steps, floor = BUDGETS[name]
    evaluate = evaluation.evaluate_policy

    def evaluate_briefly(model: Any, env: Any, n_eval_episodes: int, **kwargs: Any) -> Any:
        return evaluate(model, env, min(n_eval_episodes, 2), **kwargs)

    # That of ten or more episodes takes longer than the training
    monkeypatch.setattr(evaluation, "evaluate_policy", evaluate_briefly)
    run(name, tmp_path, monkeypatch, "--steps", str(steps))
    if floor is not None:
        returns = returns_in(capsys.readouterr().out)
        assert len(returns) >= 1
        assert min(returns) > floor
    if name in FIGURES:
        picture = (tmp_path / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 20_000


@pytest.mark.slow
def test_atari_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    roms = pytest.importorskip("ale_py.roms")
    if roms.get_rom_path("pong") is None:
        pytest.skip("there is no ROM of Pong")
    # One update of convolutional networks takes seconds
    run("atari", tmp_path, monkeypatch, "--steps", "1024", "--game", "PongNoFrameskip-v4")
    (score,) = returns_in(capsys.readouterr().out)
    assert -21 <= score <= 21


def test_family_of_the_custom_distribution_is_right() -> None:
    """Its KL is that of PyTorch, and its Fisher matrix the Hessian of the KL."""
    example = runpy.run_path(str(FOLDER / "custom_distribution.py"))
    family = example["LaplaceFamily"]()
    th.manual_seed(0)
    old, new = ((th.randn(5, 2).double(), th.randn(5, 2).double()) for _ in range(2))
    laplaces = [th.distributions.Laplace(mean, log_scale.exp()) for mean, log_scale in (old, new)]
    expected = th.distributions.kl_divergence(*laplaces).sum(dim=1)
    assert th.allclose(family.kl(old, new), expected)
    assert th.allclose(family.entropy(old), laplaces[0].entropy().sum(dim=1))
    tangent = th.randn(20).double()
    product = family.fisher(old, (tangent[:10].view(5, 2), tangent[10:].view(5, 2)))
    # At the old distribution itself, |x| has no second derivative: approach it
    shifted = th.cat([old[0].flatten() + 1e-7, old[1].flatten()])
    hessian = th.autograd.functional.hessian(
        lambda flat: family.kl(old, (flat[:10].view(5, 2), flat[10:].view(5, 2))).sum(), shifted
    )
    assert th.allclose(th.cat([part.flatten() for part in product]), hessian @ tangent, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", THRESHOLDS)
def test_example_learns(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(name, tmp_path, monkeypatch)
    returns = returns_in(capsys.readouterr().out)
    # These two start from another agent, and print its return first
    assert min(returns[-1:] if name in ("continue_contrib", "pretrain") else returns) > THRESHOLDS[name]
