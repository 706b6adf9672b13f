"""Train on the one-dimensional point mass, and draw the policy and its updates (half a minute)."""

import argparse

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_trpo_ext import TRPO

N_ENVS = 16
POSITIONS = np.linspace(-1.5, 1.5, 151, dtype=np.float32)


class Watcher(BaseCallback):
    """Records after every update the actions at rest, the returns of the rollout, the KL and the standard deviation."""

    def _on_training_start(self) -> None:
        self.actions, self.returns, self.kl, self.std = [], [], [], []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        at_rest = np.stack([POSITIONS, np.zeros_like(POSITIONS)], axis=1)
        self.actions.append(self.model.predict(at_rest, deterministic=True)[0][:, 0])
        if "train/std" in self.logger.name_to_value:  # not before the first update
            self.kl.append(self.logger.name_to_value["train/kl_divergence_loss"])
            self.std.append(self.logger.name_to_value["train/std"])

    def _on_rollout_end(self) -> None:
        self.returns.append([episode["r"] for episode in self.model.ep_info_buffer])

    _on_training_end = _on_rollout_start


def draw(watcher: Watcher, target_kl: float, path: str) -> None:
    figure = Figure(figsize=(10, 6.4), dpi=120, layout="constrained")
    (policy, returns), (kl, std) = figure.subplots(2, 2)
    rollouts = np.unique(np.geomspace(1, len(watcher.actions), 10).astype(int))
    scale = ScalarMappable(LogNorm(1, len(watcher.actions)), "viridis_r")
    for rollout in rollouts:
        policy.plot(POSITIONS, watcher.actions[rollout - 1], color=scale.to_rgba(rollout))
    bar = figure.colorbar(scale, ax=policy, ticks=rollouts, format="%d", label="rollout")
    bar.minorticks_off()
    policy.set(title="Mean action of a mass at rest", xlabel="position x", ylabel="mu(x, v = 0), within its bounds")
    updates = np.arange(1, len(watcher.kl) + 1)
    low, median, high = np.percentile(watcher.returns, [10, 50, 90], axis=1)
    returns.fill_between(updates, low, high, alpha=0.25, linewidth=0, label="10 to 90% of the episodes")
    returns.plot(updates, median, label="median")
    # A single mass that flies off would stretch the axis
    returns.set(title="Return of an episode", xlabel="update", ylim=(max(low.min(), -500), 1.1 * max(high.max(), 0)))
    kl.plot(updates, watcher.kl, ".-", label="KL(old || new)")
    kl.axhline(target_kl, color="black", linestyle="--", linewidth=1, label="target_kl")
    kl.set(title="KL of an update", xlabel="update", ylim=(0, 1.25 * target_kl))
    std.plot(updates, watcher.std)
    std.set(title="Standard deviation of the action", xlabel="update", ylim=(0, None))
    for axes in (policy, returns, kl, std):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (returns, kl):
        axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", default="point_mass.png")
    args = parser.parse_args()
    env = make_vec_env("sb3_trpo_ext/PointMass1D-v0", n_envs=N_ENVS, seed=args.seed)
    # A mass that flies off has a return a hundred times as large as others
    env = VecNormalize(env, norm_obs=False)
    model = TRPO(
        "MlpPolicy",
        env,
        n_steps=150,  # one episode of each environment
        stats_window_size=N_ENVS,
        gae_lambda=0.95,
        vf_lambda=None,
        target_kl=0.03,  # the same in all updates, for the picture
        cg_damping=0.1,
        norm_obs=False,
        policy_kwargs={"log_std_init": 0},
        learning_rate=3e-3,
        batch_size=240,
        n_critic_updates=20,
        seed=args.seed,
    )
    watcher = Watcher()
    model.learn(args.steps, callback=watcher)
    draw(watcher, model.target_kl, args.figure)


if __name__ == "__main__":
    main()
