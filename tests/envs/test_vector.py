"""Gymnasium's vector environments as a VecEnv: against SB3's DummyVecEnv, step by step."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import vector as vector_wrappers
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_trpo_ext import TRPO, MaskableTRPO
from sb3_trpo_ext.envs import VectorEnvAdapter

N_ENVS = 3
SMALL: dict[str, Any] = {"n_steps": 32, "batch_size": 48, "policy_kwargs": {"net_arch": [8]}, "device": "cpu", "seed": 0}
KINDS: dict[str, Callable[..., VectorEnv]] = {
    "sync": SyncVectorEnv,
    "sync, no copy": partial(SyncVectorEnv, copy=False),
    "async": AsyncVectorEnv,
    "async, no copy": partial(AsyncVectorEnv, copy=False),
    "async, no shared memory": partial(AsyncVectorEnv, shared_memory=False),
}
#: All that work together.
COMBINATIONS = [
    (kind, mode)
    for kind in KINDS
    for mode in AutoresetMode
    if (kind, mode) != ("async, no shared memory", AutoresetMode.NEXT_STEP)
]


class Race(gym.Env[Any, Any]):
    """Episodes of two to seven steps, which end in each of the three ways; the action moves what is observed."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 7}  # noqa: RUF012
    render_mode = "rgb_array"

    def __init__(self, is_dict: bool = False, name: str = "race"):
        part = spaces.Box(-50.0, 50.0, (2,))
        self.is_dict, self.name, self.difficulty = is_dict, name, 1.0
        self.observation_space = spaces.Dict({"position": part, "step": spaces.Discrete(8)}) if is_dict else part
        self.action_space = spaces.Box(-1.0, 1.0, (2,))
        self.steps_made = 0

    def _observation(self) -> Any:
        position = self.position.astype(np.float32)
        return {"position": position, "step": self.n_steps} if self.is_dict else position

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.n_steps = 0
        self.position = self.np_random.normal(size=2) + (options or {}).get("shift", 0)
        self.end, self.way = self.np_random.integers(2, 8), int(self.np_random.integers(3))
        return self._observation(), {"end": int(self.end)}

    def step(self, action: np.ndarray) -> Any:
        self.n_steps += 1
        self.steps_made += 1
        self.position = self.position + action
        is_over = bool(self.n_steps == self.end)
        info: dict[str, Any] = {"n": self.n_steps, "at": self.position, "_hidden": "x", "deep": {"name": self.name}}
        if self.n_steps % 2:
            info["odd"] = 0.5
        if is_over:
            info["deep"]["won"] = True
        return self._observation(), float(self.position.sum()), is_over and self.way != 0, is_over and self.way != 1, info

    def render(self) -> np.ndarray:
        return np.full((4, 4, 3), self.n_steps, np.uint8)

    def action_masks(self) -> np.ndarray:
        return np.ones(2, dtype=bool)


def races(is_dict: bool = False) -> list[Callable[[], gym.Env]]:
    return [lambda index=index: Race(is_dict, f"race {index}") for index in range(N_ENVS)]  # type: ignore[misc]


def dummy(is_dict: bool = False) -> DummyVecEnv:
    return DummyVecEnv([lambda make=make: Monitor(make()) for make in races(is_dict)])  # type: ignore[misc]


@pytest.fixture
def adapter() -> Iterator[Callable[..., VectorEnvAdapter]]:
    """Make adapters of races, which are closed at the end."""
    made = []

    def make(kind: str = "sync", mode: AutoresetMode = AutoresetMode.NEXT_STEP, is_dict: bool = False) -> VectorEnvAdapter:
        made.append(VectorEnvAdapter(KINDS[kind](races(is_dict), autoreset_mode=mode)))
        return made[-1]

    yield make
    for env in made:
        env.close()


def without_time(infos: Any) -> Any:
    return [info | {"episode": info["episode"] | {"t": 0}} if "episode" in info else info for info in infos]


def assert_same(env: Any, twin: Any, n_steps: int = 60) -> None:
    """Seeds, observations, rewards, ends and infos of two VecEnvs agree under the same actions."""
    assert env.seed(3) == twin.seed(3)
    env.action_space.seed(0)
    np.testing.assert_equal(env.reset(), twin.reset())
    kept = []
    for _ in range(n_steps):
        assert env.reset_infos == twin.reset_infos
        actions = np.stack([env.action_space.sample() for _ in range(env.num_envs)])
        step, expected = env.step(actions), twin.step(actions)
        np.testing.assert_equal(step[:3], expected[:3])
        assert [part.dtype for part in step[1:3]] == [part.dtype for part in expected[1:3]]
        np.testing.assert_equal(without_time(step[3]), without_time(expected[3]))
        assert all("t" in info["episode"] for info, done in zip(step[3], step[2], strict=True) if done)
        kept.append((step, expected))
    # Nothing has been written over since
    for step, expected in kept:
        np.testing.assert_equal(step[:3], expected[:3])
        np.testing.assert_equal(without_time(step[3]), without_time(expected[3]))


@pytest.mark.parametrize("is_dict", [False, True])
@pytest.mark.parametrize(("kind", "mode"), COMBINATIONS)
def test_it_is_sb3s_own_vec_env(kind: str, mode: AutoresetMode, is_dict: bool, adapter: Any) -> None:
    env, twin = adapter(kind, mode, is_dict), dummy(is_dict)
    assert_same(env, twin)
    # No step was spent on a reset
    assert env.get_attr("steps_made") == [60] * N_ENVS
    # A reset in the middle of an episode
    assert_same(env, twin, 5)


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_cartpole_is_that_of_sb3(kind: str, mode: AutoresetMode) -> None:
    env = VectorEnvAdapter(gym.make_vec("CartPole-v1", 2, kind, vector_kwargs={"autoreset_mode": mode}, max_episode_steps=20))
    twin = DummyVecEnv([lambda: Monitor(gym.make("CartPole-v1", max_episode_steps=20))] * 2)
    assert_same(env, twin, 100)
    env.close()


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_training_is_that_of_sb3s_vec_env(kind: str, mode: AutoresetMode, adapter: Any) -> None:
    models = [TRPO("MlpPolicy", env, **SMALL).learn(600) for env in (adapter(kind, mode), dummy())]
    for param, expected in zip(*(model.policy.parameters() for model in models), strict=True):
        assert th.equal(param, expected)
    returns = [[episode["r"] for episode in model.ep_info_buffer or ()] for model in models]
    assert len(returns[0]) > 50
    assert returns[0] == returns[1]


# === Environments of other kinds ===


class Count(VectorEnv):
    """Counts the steps of an episode, as one environment; infos are as some vector environments of others have them."""

    def __init__(self, mode: Any, finals: dict[str, Any] | None = None, hides_mode: bool = False):
        self.metadata = {} if hides_mode else {"autoreset_mode": mode}
        self.num_envs, self.render_mode, self.gravity = 3, None, 9.8
        self.single_observation_space = spaces.Box(0.0, 100.0, (1,))
        self.single_action_space = spaces.Discrete(2)
        self.steps = np.zeros((3, 1), np.float32)
        self.ends = np.array([2, 3, 5])
        self.finals, self.resets_itself = finals, mode == AutoresetMode.SAME_STEP
        self.seeds: list[Any] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.seeds.append(seed)
        where = (options or {}).get("reset_mask", np.ones(3, dtype=bool))
        self.steps[where] = 0
        # What the others observe is up to the environment
        return np.where(where[:, None], self.steps, -1.0), {"lives": np.array([4, 4, 4])}

    def step(self, actions: Any) -> Any:
        self.steps += 1
        truncated = self.steps[:, 0] >= self.ends
        info: dict[str, Any] = {"lives": np.array([3, 2, 1]), "fps": 60}
        if self.resets_itself and truncated.any():
            info |= {"final_obs": self.steps.copy()} if self.finals is None else self.finals
            self.steps[truncated] = 0
        # Integers, of which `~` would make something else
        return self.steps, np.ones(3, dtype=int), np.zeros(3, dtype=int), truncated.astype(int), info


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED, "SameStep"])
def test_a_vector_environment_with_infos_of_its_own(mode: Any) -> None:
    env: Any = VectorEnvAdapter(Count(AutoresetMode(mode)))
    env.env.metadata["autoreset_mode"] = mode
    env.seed(np.int64(7))
    np.testing.assert_array_equal(env.reset(), np.zeros((3, 1)))
    assert env.env.seeds == [7]
    assert env.reset_infos == [{"lives": 4}] * 3
    for step in range(1, 12):
        observations, rewards, dones, infos = env.step(np.zeros(3, int))
        ends = step % env.env.ends == 0
        assert dones.tolist() == ends.tolist()
        assert rewards.dtype == np.float32
        np.testing.assert_array_equal(observations[:, 0], step % env.env.ends)
        for index, end in enumerate(env.env.ends):
            info = infos[index]
            assert (info["lives"], info["fps"], info["TimeLimit.truncated"]) == (3 - index, 60, ends[index])
            assert "final_obs" not in info
            assert ("terminal_observation" in info) == ends[index] == ("episode" in info)
            if ends[index]:
                assert info["terminal_observation"].tolist() == [end]
                assert (info["episode"]["r"], info["episode"]["l"]) == (end, end)
    assert env.get_attr("gravity", indices=[1, 2]) == [9.8, 9.8]
    assert env.get_attr("render_mode") == [None] * 3
    assert env.get_images() == [None] * 3
    assert env.env_is_wrapped(Monitor) == [True] * 3
    assert env.env_is_wrapped(gym.wrappers.TimeLimit) == [False] * 3
    assert not env.has_attr("mass")
    assert not env.can_restart
    with pytest.raises(AttributeError, match=r"`mass`: .* has no such attribute"):
        env.get_attr("mass")
    with pytest.raises(AttributeError, match=r"`gravity`: .* has no single environments"):
        env.set_attr("gravity", 1)
    with pytest.raises(AttributeError, match=r"`jump`: .* has no single environments"):
        env.env_method("jump")


class Torch(vector_wrappers.TransformObservation):
    """Observations are tensors; ``device`` may tell it."""

    def __init__(self, env: VectorEnv, device: th.device | None = None):
        super().__init__(env, th.as_tensor)
        self.device = device


def test_same_step_without_final_observations_is_refused() -> None:
    env = VectorEnvAdapter(Count(AutoresetMode.SAME_STEP, finals={}))
    env.reset()
    env.step(np.zeros(3, int))
    with pytest.raises(ValueError, match=r"must have `final_obs` in its infos .* got \['fps', 'lives'\]"):
        env.step(np.zeros(3, int))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gym.make_vec("CartPole-v1", 2), r"`env` has the autoreset mode NextStep.*CartPoleVectorEnv.*mode=\"sync\""),
        (lambda: Count(AutoresetMode.NEXT_STEP), "`env` has the autoreset mode NextStep.*SAME_STEP"),
        (lambda: Count(None, hides_mode=True), "`env` does not tell its autoreset mode.*takes for NextStep"),
        (lambda: Count("Sometimes"), "`env` has the autoreset mode Sometimes"),
        (lambda: KINDS["async, no shared memory"](races()), "`env` has the autoreset mode NextStep.*AsyncVectorEnv"),
        (
            lambda: vector_wrappers.NormalizeObservation(SyncVectorEnv(races())),
            "wrapped in NormalizeObservation.*VecNormalize",
        ),
        (
            lambda: vector_wrappers.ClipReward(vector_wrappers.NormalizeReward(SyncVectorEnv(races())), -1, 1),
            "wrapped in NormalizeReward.*norm_reward",
        ),
        (lambda: Torch(SyncVectorEnv(races()), th.device("cpu")), r"tensors on cpu: use .*GymnasiumTensorVecEnv"),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_moves(
    make: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make()
    for name in ("reset", "step"):
        monkeypatch.setattr(type(env), name, lambda *_, **__: pytest.fail("it moved"))
    with pytest.raises(ValueError, match=message):
        VectorEnvAdapter(env)
    with pytest.raises(ValueError, match=message):
        TRPO("MlpPolicy", env)
    env.close()


def test_what_is_no_vector_environment_of_arrays_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`env` must be a gymnasium.vector.VectorEnv, got <.*Race"):
        VectorEnvAdapter(Race())  # type: ignore[arg-type]
    # There is no `device` to know it from
    env = VectorEnvAdapter(Torch(SyncVectorEnv(races())))
    with pytest.raises(ValueError, match=r"must return NumPy arrays, got observations of type Tensor: use .*GymnasiumTensor"):
        env.reset()
    nested = SyncVectorEnv(races())
    nested.single_observation_space = spaces.Tuple([spaces.Discrete(2)])
    with pytest.raises(ValueError, match=r"observation space Tuple.*FlattenObservation"):
        VectorEnvAdapter(nested)


@pytest.mark.parametrize("mode", AutoresetMode)
def test_vector_wrappers(mode: AutoresetMode) -> None:
    env: VectorEnv = SyncVectorEnv(races(), autoreset_mode=mode)
    env = vector_wrappers.TransformReward(env, lambda rewards: 2 * rewards)
    env = vector_wrappers.RecordEpisodeStatistics(env)
    env = vector_wrappers.DictInfoToList(env)
    wrapped: Any = VectorEnvAdapter(env)
    twin: Any = dummy()
    assert not wrapped.can_restart
    for each in (wrapped, twin):
        each.seed(0)
        each.reset()
    n_ends = 0
    for _ in range(40):
        actions = np.zeros((N_ENVS, 2), np.float32)
        (observations, rewards, dones, infos), expected = wrapped.step(actions), twin.step(actions)
        np.testing.assert_array_equal(observations, expected[0])
        np.testing.assert_array_equal(rewards, 2 * expected[1])
        np.testing.assert_array_equal(dones, expected[2])
        for info, other in zip(infos, expected[3], strict=True):
            assert ("episode" in info) == ("episode" in other)
            if "episode" in info:
                n_ends += 1
                assert info["episode"].keys() == {"r", "l", "t"}
                assert info["episode"]["r"] == pytest.approx(2 * other["episode"]["r"], abs=1e-5)
                assert info["episode"]["l"] == other["episode"]["l"]
                np.testing.assert_array_equal(info["terminal_observation"], other["terminal_observation"])
    assert n_ends > 10
    # Of the environments within
    assert wrapped.get_attr("name") == [f"race {index}" for index in range(N_ENVS)]


def test_atari_in_c_plus_plus() -> None:
    pytest.importorskip("ale_py.vector_env", exc_type=ImportError)
    if pytest.importorskip("ale_py.roms").get_rom_path("pong") is None:
        pytest.skip("there is no ROM of Pong")
    kwargs: dict[str, Any] = {"num_envs": 2, "max_num_frames_per_episode": 80}
    env: Any = VectorEnvAdapter(gym.make_vec("ALE/Pong-v5", autoreset_mode=AutoresetMode.SAME_STEP, **kwargs))
    env.reset()
    for step in range(1, 41):
        observations, _, dones, infos = env.step(np.zeros(2, int))
        assert dones.all() == dones.any() == (step % 20 == 0)
        assert observations.shape == (2, 4, 84, 84)
        for info in infos:
            assert "final_obs" not in info
            if dones.all():
                assert info["TimeLimit.truncated"]
                assert info["episode"]["l"] == 20
                assert not np.array_equal(info["terminal_observation"], observations[0])
    env.close()
    with pytest.raises(ValueError, match=r"autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP"):
        VectorEnvAdapter(gym.make_vec("ALE/Pong-v5", **kwargs))


# === What SB3 does with it ===


def test_seeds_and_options_are_for_the_next_reset_alone(adapter: Any) -> None:
    env = adapter()
    env.seed(5)
    first = env.reset()
    second = env.reset()
    env.seed(5)
    env.set_options({"shift": 10.0})
    np.testing.assert_allclose(env.reset(), first + 10, rtol=1e-6)
    env.seed(5)
    np.testing.assert_array_equal(env.reset(), first)
    assert not np.array_equal(first, second)
    env.set_options()
    for options in ([{"shift": 1.0}] * 3, []):
        with pytest.raises(ValueError, match="`options` must be one dict for all environments"):
            env.set_options(options)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_single_environments(kind: str, adapter: Any) -> None:
    env = adapter(kind)
    env.reset()
    assert env.get_attr("name", indices=[2, 0]) == ["race 2", "race 0"]
    assert env.get_attr("name", indices=1) == ["race 1"]
    env.set_attr("difficulty", [2, 3, 4])
    assert env.get_attr("difficulty") == [[2, 3, 4]] * 3
    env.set_attr("difficulty", 5.0, indices=[1])
    assert env.get_attr("difficulty") == [[2, 3, 4], 5.0, [2, 3, 4]]
    assert np.stack(env.env_method("action_masks")).shape == (3, 2)
    assert len(env.env_method("action_masks", indices=[2, 1, 0])) == 3
    assert env.has_attr("action_masks")
    with pytest.raises(ValueError, match=r"`indices` must be None, got \[0\]"):
        env.env_method("action_masks", indices=[0])
    # What is not there does no harm to processes
    assert not env.has_attr("jump")
    for ask in (env.get_attr, env.env_method):
        with pytest.raises(AttributeError, match="`jump`"):
            ask("jump")
    with pytest.raises(AttributeError, match="`jump`"):
        env.set_attr("jump", 1, indices=[0])
    assert env.env_is_wrapped(Monitor, indices=[0, 1]) == [True, True]
    env.step(np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match=r"`actions` must be of shape \(3, 2\), got \(2, 2\)"):
        env.step(np.zeros((2, 2), np.float32))


def test_wrappers_of_single_environments_are_known_where_they_can_be() -> None:
    env = VectorEnvAdapter(gym.make_vec("CartPole-v1", 2, "sync"))
    assert env.env_is_wrapped(gym.wrappers.TimeLimit) == [True, True]
    assert env.env_is_wrapped(gym.wrappers.ClipAction, indices=0) == [False]
    env.close()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_it_renders(kind: str, adapter: Any) -> None:
    env = adapter(kind)
    env.reset()
    env.step(np.zeros((3, 2), np.float32))
    assert env.metadata["render_fps"] == 7
    assert [image.mean() for image in env.get_images()] == [1, 1, 1]
    assert env.render().shape == (8, 8, 3)


def test_it_is_closed(adapter: Any) -> None:
    env = adapter("async")
    env.close()
    assert env.env.closed
    env.close()


@pytest.mark.parametrize("wrap", [VecNormalize, VecMonitor, lambda env: VecFrameStack(env, 2)])
def test_sb3_trains_evaluates_and_wraps(wrap: Callable[[VecEnv], VecEnv], adapter: Any) -> None:
    PPO("MlpPolicy", wrap(adapter()), n_steps=32, batch_size=48, n_epochs=1, device="cpu").learn(192)
    model = TRPO("MlpPolicy", wrap(adapter("sync", AutoresetMode.SAME_STEP)), **SMALL).learn(192)
    mean, _ = evaluate_policy(model, wrap(adapter("sync", AutoresetMode.DISABLED)), n_eval_episodes=6)
    assert np.isfinite(mean)


def test_dict_observations_train(adapter: Any) -> None:
    model = TRPO("MultiInputPolicy", adapter(is_dict=True), **SMALL).learn(192)
    assert model.num_timesteps == 192


def test_trpo_wraps_a_vector_environment_by_itself(tmp_path: Path) -> None:
    model = TRPO("MlpPolicy", SyncVectorEnv(races()), **SMALL).learn(96)
    assert isinstance(model.env, VectorEnvAdapter)
    model.set_env(SyncVectorEnv(races()))
    assert isinstance(model.env, VectorEnvAdapter)
    model.learn(96, reset_num_timesteps=False)
    model.save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", env=SyncVectorEnv(races()), device="cpu")
    assert isinstance(loaded.env, VectorEnvAdapter)
    loaded.learn(96)


def test_masks_come_from_the_environments() -> None:
    pytest.importorskip("sb3_contrib")
    env = gym.make_vec("sb3_trpo_ext/Blocks-v0", 3, "sync")
    MaskableTRPO("MlpPolicy", env, **SMALL).learn(96)
    env.close()
