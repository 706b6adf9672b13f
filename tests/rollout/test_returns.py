"""Targets of the value function with a lambda of their own."""

from typing import Any

import numpy as np
import pytest
from agents import collect, log_of, make_model, random_vec_env
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback

from sb3_trpo_ext import TRPO

LAMBDAS = {"gae_lambda": 0.6, "vf_lambda": 0.9, "gamma": 0.8, "n_steps": 24}


def unflattened(buffer: RolloutBuffer, name: str) -> np.ndarray:
    """An array of a buffer, of shape (n_steps, n_envs) again."""
    array: np.ndarray = getattr(buffer, name)
    return array if array.shape == buffer.rewards.shape else array.reshape(buffer.rewards.shape[::-1]).T


def lambda_returns(model: TRPO, vf_lambda: float) -> np.ndarray:
    """
    TD(lambda) returns by their definition (Sutton and Barto, equation 12.3): a mean of the returns of 1, 2, 3 ... steps.

    The longest of them, which ends with the episode or the rollout, has all of the weight that is left.
    """
    buffer, gamma = model.rollout_buffer, model.gamma
    values = unflattened(buffer, "values").astype(np.float64)
    last = model.policy.predict_values(model.policy.obs_to_tensor(model._last_obs)[0]).detach().numpy().flatten()  # type: ignore[arg-type]
    following = np.vstack([values[1:], last])
    is_end = np.vstack([buffer.episode_starts[1:], model._last_episode_starts]).astype(bool)  # type: ignore[list-item]
    n_steps, n_envs = values.shape
    returns = np.zeros_like(values)
    for env in range(n_envs):
        for start in range(n_steps):
            total, weight, discount = 0.0, 1.0, 1.0
            for step in range(start, n_steps):
                total += discount * buffer.rewards[step, env]
                discount *= gamma
                bootstrapped = total + (0.0 if is_end[step, env] else discount * following[step, env])
                is_last = is_end[step, env] or step == n_steps - 1
                share = weight if is_last else weight * (1 - vf_lambda)
                returns[start, env] += share * bootstrapped
                weight -= share
                if is_last:
                    break
    return returns


class Looks(BaseCallback):
    """Takes the rollout apart, as a callback that evaluates it may: the buffer is flat then."""

    def _on_rollout_end(self) -> None:
        next(self.model.rollout_buffer.get())  # type: ignore[attr-defined]

    def _on_step(self) -> bool:
        return True


class Own(RolloutBuffer):
    """Its targets are its own affair."""

    def compute_returns_and_advantage(self, last_values: Any, dones: Any) -> None:
        super().compute_returns_and_advantage(last_values, dones)
        self.returns += 100


@pytest.mark.parametrize("norm_reward", [False, True])
@pytest.mark.parametrize("vf_lambda", [0.0, 0.9, 1.0])
def test_returns_are_those_of_the_definition(vf_lambda: float, norm_reward: bool) -> None:
    model = collect(make_model(random_vec_env(3), **{**LAMBDAS, "vf_lambda": vf_lambda, "norm_reward": norm_reward}))
    np.testing.assert_allclose(model.rollout_buffer.returns, lambda_returns(model, vf_lambda), rtol=1e-4, atol=1e-5)


def test_advantages_are_those_of_gae_lambda() -> None:
    with_own, without = (collect(make_model(random_vec_env(3), **{**LAMBDAS, "vf_lambda": each})) for each in (0.9, None))
    np.testing.assert_array_equal(with_own.rollout_buffer.advantages, without.rollout_buffer.advantages)
    assert not np.allclose(with_own.rollout_buffer.returns, without.rollout_buffer.returns, atol=1e-2)
    # As in SB3
    np.testing.assert_array_equal(
        without.rollout_buffer.returns, without.rollout_buffer.advantages + without.rollout_buffer.values
    )


@pytest.mark.parametrize("is_lean", [True, False])
def test_a_buffer_that_a_callback_has_flattened(is_lean: bool) -> None:
    class Subclass(RolloutBuffer):
        """Not known to be SB3's own: SB3's loop fills it."""

    options: dict[str, Any] = {} if is_lean else {"rollout_buffer_class": Subclass}
    model = make_model(random_vec_env(3), **LAMBDAS, **options)
    _, callback = model._setup_learn(1000, Looks())
    assert model.env is not None
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    assert model.rollout_buffer.generator_ready
    returns = unflattened(model.rollout_buffer, "returns")
    np.testing.assert_allclose(returns, lambda_returns(model, 0.9), rtol=1e-4, atol=1e-5)
    model.train()


def test_returns_of_an_own_buffer_are_left_alone() -> None:
    buffer = collect(make_model(random_vec_env(2), **LAMBDAS, rollout_buffer_class=Own)).rollout_buffer
    np.testing.assert_allclose(buffer.returns, buffer.advantages + buffer.values + 100, rtol=1e-6)


def test_the_value_function_is_fitted_to_them() -> None:
    options: dict[str, Any] = dict(LAMBDAS)
    logs = [log_of(make_model(**{**options, "vf_lambda": each}).learn(24)) for each in (1.0, None)]
    assert logs[0]["train/value_loss"] != logs[1]["train/value_loss"]
    assert logs[0]["train/kl_divergence_loss"] == logs[1]["train/kl_divergence_loss"]


def test_models_that_never_had_it_go_on_without(tmp_path: Any) -> None:
    model = make_model(gae_lambda=0.7)
    model.save(tmp_path / "model", exclude=["vf_lambda"])
    loaded = TRPO.load(tmp_path / "model", device="cpu")
    assert (loaded.gae_lambda, loaded.vf_lambda) == (0.7, None)
    assert TRPO.load(tmp_path / "model", device="cpu", vf_lambda=0.8).vf_lambda == 0.8
