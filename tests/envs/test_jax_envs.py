"""Brax and MuJoCo Playground as environments of tensors: against Brax itself, and what is refused."""

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.envs.jax_envs import BraxVecEnv, PlaygroundVecEnv
from sb3_trpo_ext.rollout.tensors import TensorRolloutBuffer

jax = pytest.importorskip("jax", reason="JAX is not installed: pip install sb3-trpo-ext[brax]")
envs = pytest.importorskip("brax.envs", reason="Brax is not installed: pip install sb3-trpo-ext[brax]")
has_playground = pytest.mark.skipif(
    importlib.util.find_spec("mujoco_playground") is None, reason="not installed: pip install sb3-trpo-ext[playground]"
)


class Walk(envs.PipelineEnv):  # type: ignore[name-defined]
    """
    A walk on a line from a random start: it ends beyond 1. No physics, which take JAX long to compile.

    It has the habits of Brax's own tasks: numbers of Python as rewards, and writing into the metrics that it gets.
    """

    def __init__(self, n_observations: int = 2):
        self.n_observations = n_observations

    action_size = 1

    def reset(self, rng: Any) -> Any:
        place = jax.random.uniform(rng, (1,), minval=-0.5, maxval=0.5)
        return envs.State(place, self._observed(place), *jax.numpy.zeros(2), {"place": jax.numpy.zeros(())})

    def step(self, state: Any, action: Any) -> Any:
        place = state.pipeline_state + 0.1 * action
        state.metrics.update(place=1.0)
        done = jax.numpy.where(jax.numpy.abs(place[0]) > 1, 1.0, 0.0)
        return state.replace(pipeline_state=place, obs=self._observed(place), reward=1.0, done=done)

    def _observed(self, place: Any) -> Any:
        return jax.numpy.repeat(place, self.n_observations)


@pytest.fixture(autouse=True, scope="module")
def _walk() -> Iterator[None]:
    """The walk has a name; and JAX does not optimize, which takes longer than all that is computed here."""
    envs.register_environment("walk", Walk)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make(*args: Any, **kwargs: Any) -> Any:
    """Observations of a VecEnv are of many types; here they are arrays."""
    return BraxVecEnv(*args, **kwargs)


def test_spaces_shapes_and_types() -> None:
    env = make("walk", 5, n_observations=3)
    assert env.observation_space == spaces.Box(-np.inf, np.inf, (3,), np.float32)
    assert env.action_space == spaces.Box(-1, 1, (1,), np.float32)
    assert env.get_attr("max_episode_steps") == [1000] * 5
    env.reset()
    step = env.advance(th.zeros(5, 1))
    assert step.observations.shape == step.final_observations.shape == (5, 3)
    assert step.observations.dtype == step.rewards.dtype == th.float32
    assert step.terminated.dtype == step.truncated.dtype == th.bool
    # Of another type, with another order in memory, or with gradients
    for actions in (th.zeros(5, 1, dtype=th.float64), th.zeros(5, 2)[:, :1], th.zeros(5, 1, requires_grad=True)):
        th.testing.assert_close(env.advance(actions).observations, step.observations)
    # JAX compiles once
    assert env._step_all._cache_size() == env._reset_all._cache_size() == 1


def test_memory_is_shared_and_not_written_again() -> None:
    env = make("walk", 64, episode_length=3)
    env.reset()
    steps = []
    for _ in range(8):
        actions = th.rand(64, 1)
        assert jax.dlpack.from_dlpack(actions).unsafe_buffer_pointer() == actions.data_ptr()
        step = env.advance(actions)
        steps.append((step, [part.clone() for part in step]))
        array = jax.dlpack.from_dlpack(step.observations)
        assert array.unsafe_buffer_pointer() == step.observations.data_ptr()
    for step, copies in steps:
        assert all(th.equal(part, copy) for part, copy in zip(step, copies, strict=True))
    # A write into a tensor does not reach the state of the task
    expected = step.observations + 0.1
    step.observations.fill_(100.0)
    after = env.advance(th.ones(64, 1))
    th.testing.assert_close(after.final_observations, expected)


def test_time_limit_and_new_episodes() -> None:
    env = make("walk", 40, episode_length=7)
    env.seed(1)
    starts = [env.reset()]
    last = starts[0]
    for count in range(1, 15):
        observations, rewards, dones, infos = env.step(np.full((40, 1), 0.5, np.float32))
        np.testing.assert_array_equal(rewards, 1)
        expected = last + 0.05
        assert dones.all() == dones.any() == (count % 7 == 0)
        if count % 7 != 0:
            np.testing.assert_allclose(observations, expected, atol=1e-6)
        else:
            np.testing.assert_allclose([info["terminal_observation"] for info in infos], expected, atol=1e-6)
            assert all(info["TimeLimit.truncated"] and info["episode"]["l"] == 7 for info in infos)
            starts.append(observations)
        last = observations
    # All 40 are new, and so are those of each episode
    assert len(np.unique(np.concatenate(starts)[:, 0])) == 120
    assert np.abs(np.concatenate(starts)).max() <= 0.5


@pytest.mark.parametrize("n_envs", [1, 37])
def test_each_environment_ends_and_begins_by_itself(n_envs: int) -> None:
    env = make("walk", n_envs, episode_length=12)
    env.reset()
    generator = th.Generator().manual_seed(0)
    place, age = th.as_tensor(env.reset())[:, :1], th.zeros(n_envs, dtype=th.int64)
    n_terminated = n_truncated = 0
    for _ in range(60):
        actions = 2 * th.rand(n_envs, 1, generator=generator) - 0.5
        step = env.advance(actions)
        place, age = place + 0.1 * actions, age + 1
        terminated = place[:, 0].abs() > 1
        truncated = (age == 12) & ~terminated
        th.testing.assert_close(step.final_observations, place.expand(-1, 2))
        assert th.equal(step.terminated, terminated)
        assert th.equal(step.truncated, truncated)
        th.testing.assert_close(step.observations[~step.dones], step.final_observations[~step.dones], rtol=0, atol=0)
        assert (step.observations[step.dones].abs() <= 0.5).all()
        place, age = step.observations[:, :1], age.masked_fill(step.dones, 0)
        n_terminated, n_truncated = n_terminated + int(terminated.sum()), n_truncated + int(truncated.sum())
    assert n_terminated + n_truncated >= 5 * n_envs
    assert n_truncated > 0
    assert n_envs == 1 or n_terminated > 0


def test_an_end_in_the_last_step_is_no_time_limit() -> None:
    env = make("walk", 200, episode_length=10)
    env.reset()
    for _ in range(10):
        step = env.advance(th.ones(200, 1))
    # From 0 to 0.1, a walk comes to its end in the tenth step; from less, it does not come that far
    is_last, is_over = env.episode_lengths == 10, step.final_observations[:, 0] > 1
    assert (is_last & is_over).any()
    assert th.equal(step.terminated, is_over)
    assert th.equal(step.truncated, is_last & ~is_over)


def test_seeds() -> None:
    env, twin = make("walk", 4, episode_length=3), make("walk", 4, episode_length=3)
    for either in (env, twin):
        either.seed(2**32 - 1)
    np.testing.assert_array_equal(env.reset(), twin.reset())
    for _ in range(4):
        actions = np.ones((4, 1), np.float32)
        np.testing.assert_array_equal(env.step(actions)[0], twin.step(actions)[0])
    second = env.reset()
    np.testing.assert_array_equal(second, twin.reset())
    env.seed(5)
    assert not np.array_equal(env.reset(), second)
    assert not np.array_equal(make("walk", 4).reset(), make("walk", 4).reset())


def test_dict_observations() -> None:
    env = make("fast", 3, episode_length=4, obs_mode="dict_state", asymmetric_obs=True)
    assert env.observation_space == spaces.Dict(
        {"state": spaces.Box(-np.inf, np.inf, (2,)), "privileged_state": spaces.Box(-np.inf, np.inf, (4,))}
    )
    assert {key: part.shape for key, part in env.reset().items()} == {"state": (3, 2), "privileged_state": (3, 4)}
    model = TRPO("MultiInputPolicy", env, n_steps=8, batch_size=24, device="cpu").learn(24)
    assert isinstance(model.rollout_buffer, TensorRolloutBuffer)
    assert model.rollout_buffer.final_observations is not None


# === With physics ===


@pytest.fixture(scope="module")
def pendulum() -> Iterator[Any]:
    """Sixteen pendulums on carts, which are compiled once."""
    yield make("inverted_pendulum", 16, episode_length=20)


@pytest.mark.slow
def test_steps_are_those_of_brax(pendulum: Any) -> None:
    pendulum.seed(0)
    observations = pendulum.reset()
    task = envs.get_environment("inverted_pendulum")
    step = jax.jit(jax.vmap(task.step))
    state, alive, n_ended = pendulum._carry[0], np.full(16, True), 0
    np.testing.assert_array_equal(state.obs, observations)
    for count in range(1, 21):
        # Brax takes actions from -1 to 1, too
        actions = np.linspace(0, 0.3, 16, dtype=np.float32)[:, None]
        observations, rewards, dones, infos = pendulum.step(actions)
        state = step(state, actions)
        for index in np.flatnonzero(alive):
            last = infos[index]["terminal_observation"] if dones[index] else observations[index]
            np.testing.assert_allclose(last, state.obs[index], atol=1e-5)
            assert rewards[index] == pytest.approx(float(state.reward[index]), abs=1e-5)
            assert dones[index] == (state.done[index] or count == 20)
            if dones[index]:
                assert infos[index]["TimeLimit.truncated"] == (not state.done[index])
                n_ended += bool(state.done[index])
        alive &= ~dones
    assert 4 < n_ended < 16
    assert not alive.any()


def test_trpo_trains_on_the_device_and_sb3_evaluates(pendulum: Any) -> None:
    model = TRPO("MlpPolicy", pendulum, n_steps=16, device="cpu").learn(512)
    assert isinstance(model.rollout_buffer, TensorRolloutBuffer)
    assert model.num_timesteps == 512
    returns, lengths = evaluate_policy(model, pendulum, n_eval_episodes=16, return_episode_rewards=True)
    assert returns == lengths
    assert all(1 <= length <= 20 for length in np.atleast_1d(lengths))


@has_playground
@pytest.mark.slow
def test_steps_of_playground_are_those_of_mujoco() -> None:
    env: Any = PlaygroundVecEnv("CartpoleBalance", 4, episode_length=9, config_overrides={"action_repeat": 2})
    assert env.observation_space == spaces.Box(-np.inf, np.inf, (5,))
    assert env.action_space == spaces.Box(-1, 1, (1,))
    env.seed(0)
    env.reset()
    mujoco, model = importlib.import_module("mujoco"), env.task.mj_model
    twins = [mujoco.MjData(model) for _ in range(4)]
    for index, twin in enumerate(twins):
        twin.qpos, twin.qvel, twin.ctrl = env._carry[0].data.qpos[index], env._carry[0].data.qvel[index], 0.3
    for count in range(1, 6):
        observations, rewards, dones, infos = env.step(np.full((4, 1), 0.3, np.float32))
        # Nine steps of the task, two at a time; each pays up to 1
        assert dones.all() == dones.any() == (count == 5)
        assert ((rewards > 1) & (rewards <= 2)).all()
        last = [info["terminal_observation"] for info in infos] if count == 5 else observations
        for twin, observation in zip(twins, last, strict=True):
            mujoco.mj_step(model, twin, nstep=2 * env.task.n_substeps)
            # Cosine and sine of the angle, which MuJoCo computes before it moves the pole
            expected = [twin.qpos[0], twin.xmat[2, 8], twin.xmat[2, 2], *twin.qvel]
            np.testing.assert_allclose(observation, expected, atol=1e-4)
    assert all(info["TimeLimit.truncated"] for info in infos)


# === What is refused ===


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"env_name": "reachr"}, "`env_name`: Brax has no environment 'reachr'; did you mean reacher"),
        ({"n_envs": 0}, "`n_envs` must be an integer of at least 1, got 0"),
        ({"episode_length": 2.5}, "`episode_length` must be an integer of at least 1, got 2.5"),
        ({"device": "meta"}, "`device`: JAX has no device 'meta' here, only"),
        ({"device": "cuda:99"}, "`device`: JAX has no device 'cuda:99' here, only"),
    ],
)
def test_wrong_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**{"env_name": "walk", "n_envs": 2, **kwargs})


@has_playground
def test_an_unknown_task_of_playground() -> None:
    with pytest.raises(
        ValueError, match="`env_name`: MuJoCo Playground has no environment 'WalkerWlk'; did you mean WalkerWalk"
    ):
        PlaygroundVecEnv("WalkerWlk", 2)


@pytest.mark.parametrize(("kind", "extra"), [(BraxVecEnv, "brax"), (PlaygroundVecEnv, "playground")])
def test_a_missing_library_is_named(kind: Any, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=rf"{kind.__name__} needs .*: pip install sb3-trpo-ext\[{extra}\]"):
        kind("walk", 2)


def test_some_environments_begin_again() -> None:
    env = make("walk", 3, episode_length=5)
    env.seed(0)
    env.reset()
    for _ in range(2):
        before = env.advance(th.zeros(3, 1)).observations.clone()
    (first,) = env.restart([1])
    step = env.advance(th.zeros(3, 1))
    np.testing.assert_array_equal(step.observations[1], first)
    assert not th.equal(step.observations[1], before[1])
    th.testing.assert_close(step.observations[[0, 2]], before[[0, 2]])
    assert env.episode_lengths.tolist() == [3, 1, 3]
    ends = [env.advance(th.zeros(3, 1)).truncated.tolist() for _ in range(4)]
    assert ends == [[False] * 3, [True, False, True], [False] * 3, [False, True, False]]
