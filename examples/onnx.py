"""Export: an agent in a file that needs neither PyTorch nor Stable-Baselines3 (`pip install "sb3-trpo-ext[export]"`)."""

import argparse

import gymnasium as gym
import numpy as np
import onnxruntime

from sb3_trpo_ext import TRPO, export


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model = TRPO("MlpPolicy", "Pendulum-v1", seed=args.seed, verbose=1)
    model.learn(args.steps)
    export(model, "trpo_pendulum.onnx")

    # What follows could be another program: normalization and bounds of the actions are in the file
    session = onnxruntime.InferenceSession("trpo_pendulum.onnx")
    env = gym.make("Pendulum-v1")
    returns = []
    for episode in range(20):
        observation, _ = env.reset(seed=args.seed + 1000 + episode)
        returns.append(0.0)
        is_over = False
        while not is_over:
            (actions,) = session.run(None, {"observation": observation[None].astype(np.float32)})
            observation, reward, terminated, truncated, _ = env.step(actions[0])
            returns[-1] += float(reward)
            is_over = terminated or truncated
    print(f"mean return: {np.mean(returns):.1f} +- {np.std(returns):.1f}")


if __name__ == "__main__":
    main()
