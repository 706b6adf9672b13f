"""Whether EnvPool's environments are Gymnasium's: the same policy in both, and both from the same state.

For each task one fixed policy acts deterministically for 300 episodes in EnvPool and as many in Gymnasium. The policy is the
trained agent of `--run` if it is of that task, else one that is trained here in EnvPool for a short while. Return and length
are compared by their 95% intervals, by Welch's t-test of the means and by the Kolmogorov-Smirnov test of the distributions.

Then both start from the same state and take the same random actions, which shows how exactly they agree step by step, and both
are reset many times, which shows whether they start from the same distribution.

    python -m benchmarks.studies.envpool_agreement --output benchmarks/results/envpool_agreement.json

EnvPool has its own MuJoCo compiled in. With the same version of it under Gymnasium (pip install mujoco==3.6.0):

    python -m benchmarks.studies.envpool_agreement --steps-only --output benchmarks/results/envpool_same_mujoco.json
"""

import argparse
import importlib.metadata
import json
import pathlib
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from scipy import stats
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.envs import EnvPoolVecEnv
from sb3_trpo_ext.tools.report import run_episodes

TASKS = ("Humanoid-v5", "Hopper-v5", "HalfCheetah-v5", "Walker2d-v5", "Ant-v5")
N_ENVS = 8


def make_policy(env_id: str, run: pathlib.Path, n_timesteps: int) -> tuple[TRPO, VecNormalize, str]:
    """
    Load the agent of a run, or train one in EnvPool.

    :param env_id: the task
    :param run: folder of a training run in RL-Zoo's layout
    :param n_timesteps: how long to train if the run is of another task
    :return: the agent, its environments with the statistics of the observations, and where it comes from
    """
    path = run / f"{env_id}.zip"
    if path.is_file():
        model = TRPO.load(path)
        statistics = VecNormalize.load(str(run / env_id / "vecnormalize.pkl"), EnvPoolVecEnv(env_id, N_ENVS, seed=0))
        return model, statistics, f"{run}, trained for {model.num_timesteps} steps in Gymnasium"
    statistics = VecNormalize(EnvPoolVecEnv(env_id, N_ENVS, seed=0))
    model = TRPO("MlpPolicy", statistics, n_steps=256, target_kl=0.03, seed=0, device="cpu").learn(n_timesteps)
    return model, statistics, f"trained for {model.num_timesteps} steps in EnvPool"


def with_statistics(env: VecEnv, statistics: VecNormalize) -> VecNormalize:
    """
    Normalize observations as in training, and leave the rewards alone.

    :param env: the environments
    :param statistics: of the training
    :return: the environments with statistics that do not change
    """
    wrapped = VecNormalize(env, training=False, norm_reward=False, clip_obs=statistics.clip_obs, epsilon=statistics.epsilon)
    wrapped.obs_rms = statistics.obs_rms
    return wrapped


def summarize(values: list[float]) -> dict[str, Any]:
    """
    Mean with its interval.

    :param values: one for each episode
    :return: figures for the file
    """
    half_width = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    mean = float(np.mean(values))
    return {
        "mean": mean,
        "std": float(np.std(values, ddof=1)),
        "interval_95": [mean - float(half_width), mean + float(half_width)],
        "n_episodes": len(values),
    }


def compare(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """
    Compare a quantity of the episodes in EnvPool and in Gymnasium.

    :param ours: in EnvPool, one for each episode
    :param theirs: in Gymnasium
    :return: figures for the file
    """
    envpool, gymnasium = summarize(ours), summarize(theirs)
    (low, high), (other_low, other_high) = envpool["interval_95"], gymnasium["interval_95"]
    # Both are NaN if all episodes have the same length
    return {
        "envpool": envpool,
        "gymnasium": gymnasium,
        "intervals_overlap": bool(low <= other_high and other_low <= high),
        "welch_p": float(stats.ttest_ind(ours, theirs, equal_var=False).pvalue) if np.ptp([*ours, *theirs]) else None,
        "kolmogorov_smirnov_p": float(stats.ks_2samp(ours, theirs).pvalue),
    }


def step_agreement(env_id: str, n_steps: int = 20, n_starts: int = 10) -> list[dict[str, float]]:
    """
    Take the same actions from the same states.

    :param env_id: the task
    :param n_steps: number of steps
    :param n_starts: number of starts, the largest differences of which are returned
    :return: for each step the largest difference of an observation, relative to 1 plus its size, and of a reward
    """
    unwrapped: Any = gym.make(env_id).unwrapped
    n_positions, n_velocities = unwrapped.model.nq, unwrapped.model.nv
    # The observation lacks where the robot is on the ground, which makes no difference
    n_hidden = 2 if env_id in ("Humanoid-v5", "Ant-v5") else 1
    table = np.zeros((n_steps, 2))
    for seed in range(n_starts):
        env = EnvPoolVecEnv(env_id, seed=seed)
        env.reset()
        # The wrapper rounds to float32; here the float64 of EnvPool is needed
        observation: Any = env._pool.reset()[0][0]
        unwrapped.reset(seed=seed)
        positions = np.concatenate((np.zeros(n_hidden), observation[: n_positions - n_hidden]))
        unwrapped.set_state(positions, observation[n_positions - n_hidden :][:n_velocities])
        rng = np.random.default_rng(seed)
        for step in range(n_steps):
            action = rng.uniform(env.action_space.low, env.action_space.high)
            observations, rewards, terminated, _, _ = env._pool.step(action[None])
            expected, reward, expected_terminated, _, _ = unwrapped.step(action)
            error = np.abs(observations[0] - expected) / (1 + np.abs(expected))
            table[step] = np.maximum(table[step], (error.max(), abs(rewards[0] - reward)))
            if terminated[0] or expected_terminated:
                break
    return [{"step": step, "observation": row[0], "reward": row[1]} for step, row in enumerate(table.tolist(), 1)]


def reset_agreement(env_id: str, n_resets: int = 1000) -> dict[str, float]:
    """
    Compare the first observations.

    :param env_id: the task
    :param n_resets: number of resets in each, a multiple of 10
    :return: how far the means are apart at most, in standard errors, and the ratios of the standard deviations
    """
    gym_env = gym.make(env_id)
    theirs = np.stack([gym_env.reset(seed=seed)[0] for seed in range(n_resets)])
    env = EnvPoolVecEnv(env_id, n_resets // 10, seed=0)
    ours = np.concatenate([np.asarray(env.reset(), dtype=np.float64) for _ in range(10)])
    both = np.stack((ours.std(axis=0), theirs.std(axis=0)))
    moves = both.min(axis=0) > 1e-6
    errors = np.abs(ours.mean(axis=0) - theirs.mean(axis=0))[moves] / (np.hypot(*both)[moves] / n_resets**0.5)
    ratios = both[0, moves] / both[1, moves]
    fixed = np.abs(ours.mean(axis=0) - theirs.mean(axis=0))[~moves]
    return {
        "n_resets": n_resets,
        "n_moving": int(moves.sum()),
        "means_apart_in_standard_errors": float(errors.max()),
        "smallest_ratio_of_stds": float(ratios.min()),
        "largest_ratio_of_stds": float(ratios.max()),
        "largest_difference_of_fixed": float(fixed.max()) if fixed.size else 0.0,
    }


def info_keys(env_id: str) -> dict[str, list[str]]:
    """
    Compare what `info` holds after a step.

    :param env_id: the task
    :return: the keys in both, and in one alone
    """
    env, gym_env = EnvPoolVecEnv(env_id, seed=0), gym.make(env_id)
    env.reset()
    gym_env.reset(seed=0)
    still = np.zeros(env.action_space.shape or ())
    ours, theirs = set(env.step(still[None])[3][0]), set(gym_env.step(still)[4])
    return {"both": sorted(ours & theirs), "envpool": sorted(ours - theirs), "gymnasium": sorted(theirs - ours)}


def main() -> None:
    """Run the comparison and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=pathlib.Path, default=pathlib.Path("results/trpo_ext/Humanoid-v5_29"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--n-timesteps", type=int, default=50_000, help="training of the policies that are trained here")
    parser.add_argument("--n-episodes", type=int, default=300)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="tasks that are there already are kept")
    parser.add_argument("--steps-only", action="store_true", help="only start both from the same state")
    args = parser.parse_args()

    result: dict[str, Any] = json.loads(args.output.read_text()) if args.output.is_file() else {"tasks": {}}
    result["versions"] = {name: importlib.metadata.version(name) for name in ("envpool", "gymnasium", "stable_baselines3")}
    result["versions"]["mujoco of gymnasium"] = mujoco.__version__
    for env_id in args.tasks:
        if args.steps_only:
            result["tasks"][env_id] = {"same_state": step_agreement(env_id)}
            args.output.write_text(json.dumps(result, indent=1) + "\n")
            continue
        model, statistics, policy = make_policy(env_id, args.run, args.n_timesteps)
        episodes = []
        for env in (EnvPoolVecEnv(env_id, N_ENVS, seed=1000), make_vec_env(env_id, N_ENVS, seed=2000)):
            episodes.append(run_episodes(model, with_statistics(env, statistics), args.n_episodes, deterministic=True))
            env.close()
        ours, theirs = episodes
        row: dict[str, Any] = {
            "policy": policy,
            "return": compare(ours.returns, theirs.returns),
            "length": compare([float(length) for length in ours.lengths], [float(length) for length in theirs.lengths]),
            "same_state": step_agreement(env_id),
            "reset": reset_agreement(env_id),
            "info": info_keys(env_id),
        }
        result["tasks"][env_id] = row
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        for name in ("envpool", "gymnasium"):
            returns, lengths = row["return"][name], row["length"][name]
            low, high = returns["interval_95"]
            print(f"{env_id} {name}: {returns['mean']:.1f} [{low:.1f}, {high:.1f}], length {lengths['mean']:.1f}", flush=True)
        print(f"  p {row['return']['welch_p']:.3f} (Welch), {row['return']['kolmogorov_smirnov_p']:.3f} (KS); {row['reset']}")


if __name__ == "__main__":
    main()
