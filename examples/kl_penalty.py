"""The trust region as a constraint and as a penalty, side by side on CartPole."""

import argparse
import tempfile

import pandas
from matplotlib.figure import Figure
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import load_results

from sb3_trpo_ext import TRPO

#: The same in all updates, so that both forms can be compared with it.
TARGET_KL = 0.02
FORMS = {"constraint": {}, "penalty": {"learning_rate": 1e-3, "batch_size": 256}}


def train(form: str, steps: int, seed: int) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Episodes and updates of one training."""
    with tempfile.TemporaryDirectory() as folder:
        env = make_vec_env("CartPole-v1", n_envs=8, seed=seed, monitor_dir=folder)
        settings = {"n_steps": 256, "batch_size": 256, "learning_rate": 3e-3, "cg_damping": 0.01, "seed": seed}
        model = TRPO("MlpPolicy", env, target_kl=TARGET_KL, trust_region=form, trust_region_kwargs=FORMS[form], **settings)
        model.set_logger(configure(folder, ["csv"]))
        model.learn(steps)
        model.logger.dump()  # the last update
        return load_results(folder), pandas.read_csv(f"{folder}/progress.csv").dropna(subset="train/n_updates")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", default="kl_penalty.png")
    args = parser.parse_args()

    figure = Figure(figsize=(8, 8), dpi=120, layout="constrained")
    returns, kl, beta = figure.subplots(3, height_ratios=(2, 1, 1))
    for form, color in zip(FORMS, ("tab:blue", "tab:orange"), strict=True):
        episodes, updates = train(form, args.steps, args.seed)
        returns.plot(episodes["l"].cumsum(), episodes["r"], ".", color=color, markersize=4, alpha=0.3)
        average = episodes["r"].rolling(20, min_periods=1).mean()
        returns.plot(episodes["l"].cumsum(), average, color=color, label=f"{form}, mean of 20 episodes")
        kl.plot(updates["train/n_updates"], updates["train/kl_divergence_loss"], color=color)
        print(f"{form}: mean return of the last 20 episodes: {average.iloc[-1]:.1f}")
    beta.semilogy(updates["train/n_updates"], updates["train/beta"], color=color)
    kl.axhline(TARGET_KL, color="black", linestyle="--", linewidth=1)
    returns.set(title="Return of an episode", xlabel="environment steps")
    kl.set(title="KL(old || new) of an update; dashed: target_kl", xlabel="update", ylim=(0, None))
    beta.set(title="beta, the coefficient of the penalty", xlabel="update")
    returns.legend(frameon=False, loc="lower right")
    for axes in (returns, kl, beta):
        axes.grid(alpha=0.25)
    figure.savefig(args.figure)


if __name__ == "__main__":
    main()
