"""Learning curves on Atari, from pixels: ours, and SB3's PPO with RL-Zoo's settings.

    python -m benchmarks.atari run Pong --agents ours ppo --minutes 8 --device cuda
    python -m benchmarks.atari draw

Both train in ale-py's own vector environment, with the preprocessing of SB3's ``AtariWrapper``: four frames per step, gray
images of 84 x 84, four of them stacked, clipped rewards, and episodes that end with a life. Learning rates and clip ranges
fall as in a training of ten million steps; a training that is shorter stops on the way. A score is the mean of 16 whole games,
with actions that are sampled, as in RL-Zoo's ``enjoy`` for Atari. ``results/atari.csv`` has a row per score; a run that has
rows is left out.
"""

import argparse
import csv
import multiprocessing
import time
from pathlib import Path
from typing import Any

import ale_py
import gymnasium as gym
import pandas
import torch as th
from matplotlib.figure import Figure
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

from benchmarks.markdown import ROOT
from sb3_trpo_ext import TRPO
from sb3_trpo_ext.envs import VectorEnvAdapter
from sb3_trpo_ext.zoo.launches import device_name

FILE = ROOT / "results" / "atari.csv"
COLUMNS = ("game", "agent", "seed", "steps", "return", "return_std", "episodes", "seconds", "device")
N_STEPS = 10_000_000
N_EPISODES = 16
EVALUATION_SEED = 10_000
#: RL-Zoo's entry "atari" of ppo.yml.
PPO_SETTINGS: dict[str, Any] = {
    "n_steps": 128,
    "n_epochs": 4,
    "batch_size": 256,
    "learning_rate": LinearSchedule(2.5e-4, 0, 1),
    "clip_range": LinearSchedule(0.1, 0, 1),
    "vf_coef": 0.5,
    "ent_coef": 0.01,
}
#: The entry "atari" of trpo_ext.yml with twice the environments, half the steps, a thinned Fisher matrix, fewer critic passes.
OUR_SETTINGS: dict[str, Any] = {
    "n_steps": 128,
    "batch_size": 256,
    "n_critic_updates": 4,
    "gae_lambda": 0.95,
    "vf_lambda": None,
    "cg_damping": 0.1,
    "sub_sampling_factor": 4,
    "learning_rate": LinearSchedule(2.5e-4, 0, 1),
    "ent_coef": 0.01,
}
AGENTS: dict[str, tuple[type[OnPolicyAlgorithm], int, dict[str, Any]]] = {
    "ppo": (PPO, 8, PPO_SETTINGS),
    "ours": (TRPO, 16, {**OUR_SETTINGS, "target_kl": 0.01}),
    "ours, target_kl 0.03": (TRPO, 16, {**OUR_SETTINGS, "target_kl": 0.03}),
    "ours, one setting": (TRPO, 16, {}),
}
LABELS = {"ppo": "SB3 PPO", "ours": "sb3-trpo-ext"}


def make_env(game: str, n_envs: int, is_training: bool, n_threads: int) -> VecEnv:
    """
    Games of Atari side by side.

    :param game: such as "Pong"
    :param n_envs: how many
    :param is_training: whether episodes end with a life, and rewards are clipped
    :param n_threads: that step them
    :return: the environments
    """
    gym.register_envs(ale_py)
    options = {"episodic_life": is_training, "reward_clipping": is_training, "num_threads": n_threads}
    mode = gym.vector.AutoresetMode.SAME_STEP
    return VectorEnvAdapter(gym.make_vec(f"ALE/{game}-v5", n_envs, autoreset_mode=mode, **options))


class Scores(BaseCallback):
    """
    Lets the agent play whole games now and then, and ends the training after some time.

    :param row: of the run
    :param games: to play
    :param every: steps between two scores
    :param minutes: of training, without the games in between
    :param path: of the file that gets a row per score
    """

    def __init__(self, row: dict[str, Any], games: VecEnv, every: int, minutes: float, path: Path):
        super().__init__()
        self.row, self.games, self.every, self.seconds, self.path = row, games, every, 60 * minutes, path
        self.started, self.played = time.perf_counter(), 0.0

    def _spent(self) -> float:
        return time.perf_counter() - self.started - self.played

    def score(self) -> None:
        """Play, and write a row."""
        spent = self._spent()
        self.games.seed(EVALUATION_SEED)
        mean, std = evaluate_policy(self.model, self.games, N_EPISODES, deterministic=False, warn=False)
        self.played += self._spent() - spent
        row = {**self.row, "steps": self.num_timesteps, "return": f"{mean:.5g}", "return_std": f"{std:.3g}"}
        with self.path.open("a") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow({**row, "seconds": round(spent)})
        print(row, round(spent), flush=True)

    def _on_rollout_start(self) -> None:
        if self.num_timesteps >= self.next_score:
            self.score()
            self.next_score += self.every

    def _on_training_start(self) -> None:
        self.next_score = self.every

    def _on_step(self) -> bool:
        return self._spent() < self.seconds

    def _on_training_end(self) -> None:
        self.score()


def run(game: str, agent: str, seed: int, args: argparse.Namespace) -> None:
    """Train an agent."""
    th.set_num_threads(1)
    algorithm, n_envs, settings = AGENTS[agent]
    env = make_env(game, n_envs, True, args.threads)
    model = algorithm("CnnPolicy", env, seed=seed, device=args.device, **settings)
    row = {"game": game, "agent": agent, "seed": seed, "episodes": N_EPISODES, "device": device_name(model.device)}
    games = make_env(game, N_EPISODES, False, args.threads)
    model.learn(N_STEPS, Scores(row, games, args.every, args.minutes, args.output))
    if args.save is not None:
        model.policy.save(args.save / f"{game}_{agent}_{seed}.zip".replace(", ", "_").replace(" ", "_"))


def draw() -> None:
    """Draw the learning curves."""
    frame = pandas.read_csv(FILE)
    games = list(frame["game"].unique())
    figure = Figure(figsize=(4.5 * len(games), 3.4), dpi=120, layout="constrained")
    for axes, game in zip(figure.subplots(1, len(games), squeeze=False)[0], games, strict=True):
        for (agent, _), run in frame[frame["game"] == game].groupby(["agent", "seed"], sort=False):
            axes.plot(run["steps"] / 1e6, run["return"], "o-", markersize=3, label=LABELS.get(agent, agent))
        axes.set(title=game, xlabel="million steps", ylabel="score")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(FILE.with_suffix(".png"))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("run", help="train agents side by side, and let them play")
    train.add_argument("game", help="such as Pong")
    train.add_argument("--agents", nargs="+", choices=AGENTS, default=["ours", "ppo"])
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--minutes", type=float, default=8.0, help="of each training")
    train.add_argument("--every", type=int, default=250_000, help="steps between two scores")
    train.add_argument("--threads", type=int, default=3, help="of the environments of one agent")
    train.add_argument("--device", default="auto")
    train.add_argument("--output", type=Path, default=FILE)
    train.add_argument("--save", type=Path, help="a folder for the policies")
    commands.add_parser("draw", help="draw the curves")
    args = parser.parse_args()
    if args.command == "draw":
        draw()
        return
    if not args.output.exists():
        args.output.write_text(",".join(COLUMNS) + "\n")
    rows = pandas.read_csv(args.output)
    done = set(zip(rows["game"], rows["agent"], rows["seed"], strict=True))
    context = multiprocessing.get_context("spawn")
    left = [agent for agent in args.agents if (args.game, agent, args.seed) not in done]
    processes = [context.Process(target=run, args=(args.game, agent, args.seed, args)) for agent in left]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()
