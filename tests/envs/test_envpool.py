"""EnvPool as a VecEnv: against EnvPool itself, against Gymnasium, and under SB3's algorithms, wrappers and callbacks."""

import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml
from gymnasium import spaces
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.envs import EnvPoolVecEnv
from sb3_trpo_ext.envs.envpool import was_interrupted
from sb3_trpo_ext.tools import report
from sb3_trpo_ext.zoo.command import main
from sb3_trpo_ext.zoo.options import Training, parse, prepared

envpool = pytest.importorskip("envpool", reason="EnvPool is not installed: pip install sb3-trpo-ext[envpool]")

MUJOCO = ("Humanoid-v5", "Hopper-v5", "HalfCheetah-v5", "Walker2d-v5", "Ant-v5")
#: A Hopper that always pushes like this falls in a few steps.
FALL = -np.ones((1, 3))
STEPS_UNTIL_FALL = 6
SMALL: dict[str, Any] = {"n_steps": 32, "batch_size": 64, "policy_kwargs": {"net_arch": [8]}, "device": "cpu", "seed": 0}


def make(env_id: str, *args: Any, **kwargs: Any) -> Any:
    """Observations of a VecEnv are of many types; here they are arrays if the task has no Dict."""
    return EnvPoolVecEnv(env_id, *args, **kwargs)


def random_actions(env: VecEnv, n_steps: int) -> list[np.ndarray]:
    env.action_space.seed(0)
    return [np.stack([env.action_space.sample() for _ in range(env.num_envs)]) for _ in range(n_steps)]


# === Against EnvPool, which resets a step late ===


def test_episode_ends_and_starts_are_those_of_envpool_without_its_idle_step() -> None:
    n_steps, n_envs, seed = 150, 3, 7
    env = make("Hopper-v5", n_envs, seed=seed, num_threads=2)
    actions = random_actions(env, n_steps)
    observations = [env.reset()]
    steps = []
    for action in actions:
        steps.append(env.step(action))
        observations.append(steps[-1][0])

    n_ends = 0
    for index in range(n_envs):
        raw = envpool.make_gymnasium("Hopper-v5", num_envs=1, seed=seed + index)
        np.testing.assert_array_equal(observations[0][index], raw.reset()[0][0].astype(np.float32))
        elapsed = 0
        for time, action in enumerate(actions):
            expected, reward, terminated, truncated, info = raw.step(action[index : index + 1])
            elapsed += 1
            # EnvPool agrees that it has taken as many steps as we have
            assert info["elapsed_step"][0] == elapsed
            observation, rewards, dones, infos = steps[time]
            assert rewards[index] == reward[0]
            assert dones[index] == (terminated[0] or truncated[0])
            expected = expected[0].astype(np.float32)
            if dones[index]:
                n_ends += 1
                np.testing.assert_array_equal(infos[index]["terminal_observation"], expected)
                # The step that EnvPool spends on the reset, whatever the action
                expected, reward, *_, info = raw.step(np.full((1, 3), np.nan))
                assert (reward[0], info["elapsed_step"][0]) == (0, 0)
                expected = expected[0].astype(np.float32)
                elapsed = 0
                assert not np.allclose(infos[index]["terminal_observation"], expected, atol=1e-3)
            else:
                assert "terminal_observation" not in infos[index]
            np.testing.assert_array_equal(observation[index], expected)
    assert n_ends >= 3


def test_step_starts_in_step_async_and_actions_may_change_afterwards() -> None:
    env, twin = (make("Hopper-v5", 2, seed=0) for _ in range(2))
    actions = random_actions(env, 1)[0]
    env.reset()
    twin.reset()
    expected = twin.step(actions)[0]
    env.step_async(actions)
    actions[:] = 0
    np.testing.assert_array_equal(env.step_wait()[0], expected)


def test_arrays_that_were_returned_are_ours() -> None:
    env = make("Hopper-v5", 1, seed=0)
    first = env.reset()
    kept = [first, *(env.step(FALL)[0] for _ in range(3))]
    copies = [observation.copy() for observation in kept]
    last_infos = None
    for _ in range(20):
        observation, _, dones, infos = env.step(FALL)
        if dones[0] and last_infos is None:
            last_infos = infos
            terminal = infos[0]["terminal_observation"].copy()
        observation[:] = np.nan
    for observation, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(observation, copy)
    assert last_infos is not None
    np.testing.assert_array_equal(last_infos[0]["terminal_observation"], terminal)


# === Time limits ===


@pytest.mark.parametrize(
    ("max_episode_steps", "is_cut_off"), [(STEPS_UNTIL_FALL - 1, True), (STEPS_UNTIL_FALL, False), (1000, False)]
)
def test_time_limit_is_told_from_a_true_end(max_episode_steps: int, is_cut_off: bool) -> None:
    """Also when both come in the same step: EnvPool itself would call that truncated."""
    env = make("Hopper-v5", seed=1, max_episode_steps=max_episode_steps)
    gym_env = gym.make("Hopper-v5", max_episode_steps=max_episode_steps)
    env.reset()
    gym_env.reset(seed=0)
    n_steps, is_done = 0, False
    while not is_done:
        n_steps += 1
        _, _, dones, infos = env.step(FALL)
        _, _, terminated, truncated, _ = gym_env.step(FALL[0])
        assert infos[0]["TimeLimit.truncated"] == (truncated and not terminated)
        assert dones[0] == (terminated or truncated)
        is_done = bool(dones[0])
    assert n_steps == min(max_episode_steps, STEPS_UNTIL_FALL)
    assert infos[0]["TimeLimit.truncated"] is is_cut_off


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "CheetahRun-v1"])
def test_episode_is_cut_off_after_as_many_steps_as_it_may_last(env_id: str) -> None:
    """The limit is kept by us if Gymnasium has the task, else by EnvPool."""
    assert (env_id in gym.registry) == (env_id == "HalfCheetah-v5")
    env = make(env_id, 2, seed=0, max_episode_steps=5)
    env.reset()
    still = np.zeros((2, *env.action_space.shape))
    for n_steps in range(1, 16):
        _, _, dones, infos = env.step(still)
        is_last = n_steps % 5 == 0
        assert dones.tolist() == [is_last] * 2
        assert [info["TimeLimit.truncated"] for info in infos] == [is_last] * 2
        assert [info["elapsed_step"] for info in infos] == [(n_steps - 1) % 5 + 1] * 2
    assert env.get_attr("spec")[0].max_episode_steps == 5


# === Statistics ===


def test_episode_statistics_are_those_of_a_hand_count(tmp_path: Path) -> None:
    env = make("Hopper-v5", 3, seed=0, monitor_file=str(tmp_path / "0"), info_keywords=("x_position",))
    env.reset()
    returns, lengths = np.zeros(3), np.zeros(3, dtype=int)
    counted, reported = [], []
    for actions in random_actions(env, 150):
        _, rewards, dones, infos = env.step(actions)
        returns += rewards
        lengths += 1
        for index, info in enumerate(infos):
            assert ("episode" in info) == dones[index]
            if dones[index]:
                counted.append((returns[index], lengths[index]))
                reported.append((info["episode"]["r"], info["episode"]["l"]))
                assert info["episode"]["x_position"] == info["x_position"]
                assert info["episode"]["t"] >= 0
                returns[index] = lengths[index] = 0
    env.close()
    assert len(counted) > 3
    np.testing.assert_allclose(reported, counted, atol=1e-6)
    table = load_results(str(tmp_path))
    np.testing.assert_allclose(table[["r", "l"]], counted, atol=1e-6)
    assert "x_position" in table


def test_statistics_restart_with_a_reset() -> None:
    env = make("Hopper-v5", seed=1)
    env.reset()
    env.step(FALL)
    env.reset()
    env.reset_infos[0] = {}
    total = 0.0
    for _ in range(STEPS_UNTIL_FALL):
        _, rewards, dones, infos = env.step(FALL)
        total += rewards[0]
    assert dones[0]
    assert infos[0]["episode"]["l"] == STEPS_UNTIL_FALL
    assert infos[0]["episode"]["r"] == pytest.approx(total, abs=1e-5)
    # Those of the new episode
    assert env.reset_infos[0]["elapsed_step"] == 0


def test_statistics_are_those_of_vec_monitor() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = VecMonitor(make("Hopper-v5", 2, seed=0))
    plain = make("Hopper-v5", 2, seed=0)
    env.reset()
    plain.reset()
    n_episodes = 0
    for actions in random_actions(env, 100):
        for theirs, ours in zip(env.step(actions)[3], plain.step(actions)[3], strict=True):
            assert ("episode" in theirs) == ("episode" in ours)
            if "episode" in ours:
                n_episodes += 1
                assert theirs["episode"]["l"] == ours["episode"]["l"]
                assert theirs["episode"]["r"] == pytest.approx(ours["episode"]["r"], abs=1e-4)
    assert n_episodes > 0


# === Seeds ===


def first_steps(env: Any) -> np.ndarray:
    observations = [env.reset()]
    observations += [env.step(actions)[0] for actions in random_actions(env, 30)]
    return np.stack(observations)


def test_same_seed_same_episodes_whatever_the_threads() -> None:
    expected = first_steps(make("Hopper-v5", 3, seed=5, num_threads=1))
    np.testing.assert_array_equal(first_steps(make("Hopper-v5", 3, seed=5, num_threads=3)), expected)
    assert not np.array_equal(first_steps(make("Hopper-v5", 3, seed=6)), expected)


def test_seed_after_construction_takes_effect_at_the_next_reset() -> None:
    expected = first_steps(make("Hopper-v5", 3, seed=5))
    env = make("Hopper-v5", 3, seed=0)
    env.reset()
    assert env.seed(5) == [5, 6, 7]
    env.step(np.zeros((3, 3)))
    np.testing.assert_array_equal(first_steps(env), expected)
    # The seed is used up: the next episodes are others
    assert not np.array_equal(first_steps(env), expected)
    env.seed(5)
    np.testing.assert_array_equal(first_steps(env), expected)


def test_every_environment_has_a_seed_of_its_own() -> None:
    observations = make("Hopper-v5", 3, seed=5).reset()
    assert not np.array_equal(observations[0], observations[1])
    np.testing.assert_array_equal(make("Hopper-v5", 1, seed=6).reset()[0], observations[1])


def test_without_a_seed_numpys_generator_decides() -> None:
    set_random_seed(3)
    first = make("Hopper-v5").reset()
    second = make("Hopper-v5").reset()
    assert not np.array_equal(first, second)
    set_random_seed(3)
    np.testing.assert_array_equal(make("Hopper-v5").reset(), first)


def test_seeds_of_rl_zoo_may_be_larger_than_envpools() -> None:
    env = make("Hopper-v5", 2, seed=2**32 - 1)
    assert np.isfinite(env.reset()).all()
    assert np.isfinite(make("Hopper-v5", 2, seed=np.int64(3)).reset()).all()


# === Against Gymnasium ===


@pytest.mark.parametrize("env_id", MUJOCO)
def test_steps_agree_with_gymnasium_from_the_same_state(env_id: str) -> None:
    """Humanoid and Ant agree less well, for EnvPool has another version of MuJoCo inside."""
    env = make(env_id, seed=3)
    gym_env = gym.make(env_id)
    assert env.observation_space.shape == gym_env.observation_space.shape
    assert env.action_space == gym_env.action_space
    observation = env.reset()[0]
    gym_env.reset(seed=0)
    unwrapped: Any = gym_env.unwrapped
    n_positions, n_velocities = unwrapped.model.nq, unwrapped.model.nv
    # The observation lacks where the robot is on the ground
    n_hidden = 2 if env_id in ("Humanoid-v5", "Ant-v5") else 1
    positions = np.zeros(n_positions)
    positions[n_hidden:] = observation[: n_positions - n_hidden]
    velocities = observation[n_positions - n_hidden :][:n_velocities]
    unwrapped.set_state(positions, velocities)
    np.testing.assert_allclose(observation, unwrapped._get_obs(), atol=1e-5)

    for actions in random_actions(env, 3):
        observations, rewards, dones, _ = env.step(actions)
        expected, reward, *_ = gym_env.step(actions[0])
        assert not dones[0]
        # Float32 of numbers up to 10, and for Ant contacts that are resolved a little differently
        np.testing.assert_allclose(observations[0], expected, atol=2e-3 if env_id == "Ant-v5" else 1e-4)
        assert rewards[0] == pytest.approx(reward, abs=1e-3)


# === The interface ===


def test_spaces_and_data_types() -> None:
    env = make("Humanoid-v5", 2, seed=0)
    observations = env.reset()
    assert isinstance(env.observation_space, spaces.Box)
    assert env.observation_space.shape == (348,)
    assert env.observation_space.dtype == env.action_space.dtype == observations.dtype == np.float32
    assert observations.shape == (2, 348)
    observations, rewards, dones, infos = env.step(np.zeros((2, 17)))
    assert observations.dtype == rewards.dtype == np.float32
    assert dones.dtype == bool
    assert rewards.shape == dones.shape == (2,)
    assert len(infos) == len(env.reset_infos) == 2
    assert {"x_position", "reward_linvel", "elapsed_step", "TimeLimit.truncated"} <= infos[0].keys()
    assert type(infos[0]["x_position"]) is float
    assert all(env.observation_space.contains(observation) for observation in observations)


def test_dict_observations_and_discrete_actions() -> None:
    env = make("HumanoidStand-v1", 2, seed=0, max_episode_steps=3)
    assert isinstance(env.observation_space, spaces.Dict)
    observations = env.reset()
    assert isinstance(observations, dict)
    for _ in range(3):
        observations, _, dones, infos = env.step(np.zeros((2, 21)))
    assert dones.all()
    assert isinstance(observations, dict)
    terminal = infos[1]["terminal_observation"]
    assert terminal.keys() == observations.keys() == env.observation_space.spaces.keys()
    for key, space in env.observation_space.spaces.items():
        assert observations[key].dtype == terminal[key].dtype == space.dtype == np.float32
        assert terminal[key].shape == space.shape
        assert space.contains(terminal[key])
    assert not np.array_equal(terminal["velocity"], observations["velocity"][1])

    env = make("CartPole-v1", 2, seed=0)
    assert env.action_space == spaces.Discrete(2)
    env.reset()
    assert env.step(np.array([0, 1]))[0].shape == (2, 4)


def test_what_sb3_asks_the_environments() -> None:
    env = make("Hopper-v5", 3, seed=0)
    assert env.get_attr("render_mode") == [None] * 3
    assert env.render_mode is None
    assert [spec.id for spec in env.get_attr("spec", indices=[0, 2])] == ["Hopper-v5"] * 2
    assert env.get_attr("action_space", indices=1) == [env.action_space]
    assert env.get_attr("observation_space") == [env.observation_space] * 3
    assert env.get_attr("metadata")[0]["render_modes"] == []
    assert env.env_is_wrapped(Monitor) == [True] * 3
    assert env.env_is_wrapped(gym.wrappers.TimeLimit, indices=[0]) == [False]
    assert not env.has_attr("action_masks")
    with pytest.raises(AttributeError, match=r"C\+\+ and have no attribute 'x', only"):
        env.get_attr("x")
    with pytest.raises(AttributeError, match="options of the task"):
        env.set_attr("x", 1)
    with pytest.raises(AttributeError, match="DummyVecEnv"):
        env.env_method("action_masks")
    with pytest.raises(NotImplementedError, match=r"gymnasium\.make"):
        env.render()
    env.set_options(None)
    env.set_options([{}, {}, {}])
    with pytest.raises(ValueError, match="options"):
        env.set_options({"x": 1})


def test_use_in_the_wrong_order_is_refused() -> None:
    env = make("Hopper-v5", 2, seed=0)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros((2, 3)))
    env.reset()
    # EnvPool itself checks the shape in the first step only
    env.step(np.zeros((2, 3)))
    for shape in ((1, 3), (2, 4), (2,), (6,)):
        with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
            env.step(np.zeros(shape))
    env.step(np.zeros((2, 3)))
    env.close()
    env.close()
    with pytest.raises(RuntimeError, match="have been closed"):
        env.reset()
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros((2, 3)))


def test_training_goes_on_after_an_interrupted_step() -> None:
    env = make("Hopper-v5", 2, seed=0)
    model = TRPO("MlpPolicy", env, n_steps=16, batch_size=16, device="cpu").learn(32)
    env.step_async(np.zeros((2, 3)))
    assert was_interrupted(env)
    model.learn(32, reset_num_timesteps=False)
    assert model.num_timesteps == 64
    assert not was_interrupted(env)
    env.close()


def test_reset_after_an_interrupted_step() -> None:
    """What Ctrl-C leaves behind: a step whose result is never read, or lost."""
    env = make("Hopper-v5", 2, seed=0)
    still = np.zeros((2, 3))
    first = env.reset()
    for is_lost in (False, True):
        env.step_async(still)
        if is_lost:
            env._pool.recv()
        with pytest.raises(RuntimeError, match="interrupted"):
            env.step_async(still)
        observations = env.reset()
        assert [info["elapsed_step"] for info in env.reset_infos] == [0, 0]
        assert not np.array_equal(observations, first)
        assert [info["elapsed_step"] for info in env.step(still)[3]] == [1, 1]
        first = observations
    env.step_async(still)
    env.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"env_id": "Humanoid-v6"}, r"no task 'Humanoid-v6'; did you mean .*Humanoid-v5"),
        ({"n_envs": 0}, "`n_envs` must be an integer of at least 1, got 0"),
        ({"n_envs": 2.0}, "`n_envs` must be an integer"),
        ({"n_envs": True}, "`n_envs` must be an integer"),
        ({"num_threads": 0}, "`num_threads` must be an integer of at least 1, got 0"),
        ({"seed": "a"}, "`seed` must be an integer from 0 to .* or None .*, got 'a'"),
        ({"seed": 1.5}, "`seed` must be an integer"),
        ({"healthy_rewards": 1.0}, "`healthy_rewards`: .*did you mean healthy_reward"),
        ({"healthy_reward": "much"}, "much"),
        ({"max_episode_steps": 0}, "`max_episode_steps` must be an integer of at least 1, got 0"),
        ({"num_envs": 4}, "pass `n_envs`"),
        ({"batch_size": 1}, "step together"),
        ({"render_mode": "human"}, "do not render"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnvPoolVecEnv(**{"env_id": "Hopper-v5", **arguments})


def test_options_reach_the_task() -> None:
    rewards = []
    for healthy_reward in (1.0, 3.0):
        env = make("Hopper-v5", seed=0, healthy_reward=healthy_reward)
        env.reset()
        rewards.append(env.step(np.zeros((1, 3)))[1][0])
    assert rewards[1] - rewards[0] == pytest.approx(2, abs=1e-6)


# === Under SB3 ===


@pytest.mark.parametrize(
    ("algorithm", "env_id", "kwargs"),
    [
        (TRPO, "Hopper-v5", SMALL),
        (PPO, "Hopper-v5", SMALL),
        (TRPO, "CartPole-v1", SMALL),
        (SAC, "Hopper-v5", {"policy_kwargs": {"net_arch": [8]}, "device": "cpu", "learning_starts": 20, "buffer_size": 1000}),
        (
            DQN,
            "CartPole-v1",
            {"policy_kwargs": {"net_arch": [8]}, "device": "cpu", "learning_starts": 20, "buffer_size": 1000},
        ),
    ],
)
def test_any_algorithm_learns(algorithm: type[BaseAlgorithm], env_id: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    env = make(env_id, 4, seed=0)
    model = algorithm("MlpPolicy", env, **kwargs)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.learn(256)
    assert model.num_timesteps >= 256
    assert model.ep_info_buffer
    after = model.policy.state_dict()
    assert any(not before[name].equal(after[name]) for name in before)

    # The model goes on in Gymnasium's environment
    model.save(tmp_path / "model")
    returns, lengths = evaluate_policy(algorithm.load(tmp_path / "model"), gym.make(env_id), 2, warn=False)
    assert np.isfinite([returns, lengths]).all()
    gym_env = make_vec_env(lambda: gym.wrappers.DtypeObservation(gym.make(env_id), np.float32))
    algorithm.load(tmp_path / "model", env=gym_env).learn(64)


def test_same_seed_same_model() -> None:
    models = [TRPO("MlpPolicy", make("Hopper-v5", 2), **SMALL).learn(128) for _ in range(2)]
    first, second = (model.policy.state_dict() for model in models)
    assert all(value.equal(second[name]) for name, value in first.items())


def test_wrappers_and_evaluation_callback(tmp_path: Path) -> None:
    env: Any = VecNormalize(VecFrameStack(make("Hopper-v5", 2, seed=0), 2))
    eval_env = VecNormalize(VecFrameStack(make_vec_env("Hopper-v5", seed=1), 2), training=False, norm_reward=False)
    callback = EvalCallback(eval_env, n_eval_episodes=1, eval_freq=64, log_path=str(tmp_path), verbose=0)
    model = TRPO("MlpPolicy", env, **SMALL)
    model.learn(256, callback)
    assert env.obs_rms.count > 256
    evaluations = np.load(tmp_path / "evaluations.npz")
    assert evaluations["timesteps"].tolist() == [128, 256]
    assert np.isfinite(evaluations["results"]).all()


def test_evaluate_policy_counts_raw_rewards_without_a_warning() -> None:
    env = VecNormalize(make("Hopper-v5", 2, seed=0))
    model = TRPO("MlpPolicy", env, **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        returns, lengths = evaluate_policy(model, env, 4, return_episode_rewards=True)
    assert isinstance(returns, list) and isinstance(lengths, list)
    assert len(returns) == 4
    # About 1 per step for being healthy, which normalized rewards would not be
    assert all(0.5 < value / length < 3 for value, length in zip(returns, lengths, strict=True))


# === Under RL-Zoo ===

TRAIN = ["train", "--env", "Hopper-v5", "-n", "512", "--device", "cpu", "--seed", "0", "--vec-env", "envpool"]
TINY = ["-params", "n_envs:4", "n_steps:64", "batch_size:64", "n_critic_updates:1"]


def test_command_line_trains_in_envpool_and_evaluates_in_gymnasium(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    makers: list[str] = []

    def spy(cls: type, name: str) -> None:
        original = cls.__init__  # type: ignore[misc]

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            makers.append(name)
            original(self, *args, **kwargs)

        monkeypatch.setattr(cls, "__init__", init)

    spy(EnvPoolVecEnv, "envpool")
    assert main([*TRAIN, "--eval-freq", "256", "--eval-episodes", "1", *TINY]) == 0
    # Once to check the settings, once to train
    assert makers == ["envpool"] * 2

    folder = tmp_path / "logs" / "trpo_ext" / "Hopper-v5_1"
    args = yaml.load((folder / "Hopper-v5" / "args.yml").read_text(), Loader=yaml.UnsafeLoader)
    assert args["vec_env"] == "envpool"
    assert (folder / "evaluations.npz").is_file()
    episodes = load_results(str(folder))
    assert len(episodes) > 3
    assert 256 < episodes["l"].sum() <= 512

    report.main(["--env", "Hopper-v5", "--n-eval-episodes", "1"])
    assert (folder / "evaluation.json").is_file()
    assert (folder / "learning_curve.png").is_file()
    main(["enjoy", "--env", "Hopper-v5", "--no-render", "-n", "300", "--device", "cpu"])
    assert "Mean reward" in capsys.readouterr().out
    # No more environments of EnvPool, and training without the option has none either
    assert makers == ["envpool"] * 2
    main([*TRAIN[:-2], "--eval-freq", "-1", *TINY])
    assert makers == ["envpool"] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-params", "env_wrapper:'gymnasium.wrappers.FlattenObservation'"], "`env_wrapper`: .*--vec-env dummy"),
        (["-params", "monitor_kwargs:dict(allow_early_resets=False)"], "`allow_early_resets`: "),
        (["--env-kwargs", "healthy_rewards:1"], "`healthy_rewards`: .*did you mean healthy_reward"),
        (["--env", "LunarLander-v4"], "LunarLander"),
    ],
)
def test_command_line_refuses_what_envpool_cannot_do(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        main([*TRAIN, *arguments, "--verbose", "2"])
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("option", [["--vec-env", "envpool"], ["--vec-env=envpool"], ["--vec-env", "subproc"], []])
def test_option_is_found_and_taken_out(option: list[str]) -> None:
    others = ["-n", "3", "--env", "Hopper-v5", "--seed", "-1"]
    for arguments in ([*option, *others], [*others, *option]):
        training = Training()
        left = prepared(parse("train", arguments), training).to_arguments()
        assert training.in_envpool == ("envpool" in "".join(option))
        assert ("subproc" in left) == ("subproc" in option)
        assert "envpool" not in "".join(left)


def test_command_line_names_the_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(ImportError, match=r"pip install sb3-trpo-ext\[envpool\]"):
        main([*TRAIN, "--verbose", "2"])
    assert not list(tmp_path.iterdir())
