"""Film the trained Humanoid-v5 agent: ``results/humanoid.gif``, which the README shows.

    MUJOCO_GL=egl python -m benchmarks.studies.humanoid_gif results/trpo_ext/Humanoid-v5_29

One deterministic episode with a seed that was never used in training, with the observation statistics frozen, from its first
step on and in real time. Headless rendering needs EGL (Debian: libegl1).
"""

import argparse
import pathlib
from typing import Any

import gymnasium as gym
from PIL import Image
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_trpo_ext import TRPO

ENV_ID = "Humanoid-v5"
#: Steps of 15 ms between two frames.
FRAME_SKIP = 6
#: From the side, moving along with the torso.
CAMERA = {"distance": 3.5, "azimuth": 110.0, "elevation": -12.0}


def film(run: pathlib.Path, n_steps: int, seed: int, size: int) -> tuple[list[Image.Image], float]:
    """
    Run the agent.

    :param run: folder of the run, in RL-Zoo's layout
    :param n_steps: at most that many environment steps
    :param seed: of the episode
    :param size: width and height in pixels
    :return: frames, and the distance walked in meters
    """
    options = {"render_mode": "rgb_array", "width": size, "height": size, "default_camera_config": CAMERA}
    env = DummyVecEnv([lambda: gym.make(ENV_ID, **options)])
    env.seed(seed)
    normalized = VecNormalize.load(str(run / ENV_ID / "vecnormalize.pkl"), env)
    normalized.training = False
    model = TRPO.load(run / f"{ENV_ID}.zip", device="cpu")
    observations = normalized.reset()
    humanoid: Any = env.envs[0].unwrapped
    frames: list[Image.Image] = []
    distance = 0.0
    for step in range(n_steps):
        if step % FRAME_SKIP == 0:
            humanoid.render()
            # Gymnasium makes the viewer with the first picture, and its camera stays where it is
            humanoid.mujoco_renderer.viewer.cam.lookat[:] = [*humanoid.data.qpos[:2], 0.9]
            frames.append(Image.fromarray(humanoid.render()))
        actions, _ = model.predict(observations, deterministic=True)  # type: ignore[arg-type]
        observations, _, dones, infos = normalized.step(actions)
        distance = float(infos[0].get("x_position", distance))
        if dones[0]:
            break
    return frames, distance


def main() -> None:
    """Film and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=200)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("results/humanoid.gif"))
    args = parser.parse_args()
    frames, distance = film(args.run, args.steps, args.seed, args.size)
    # One palette for all frames, which otherwise flicker and take twice the space
    palette = frames[0].quantize(64)
    images = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    milliseconds = 15 * FRAME_SKIP
    images[0].save(args.output, save_all=True, append_images=images[1:], duration=milliseconds, loop=0, optimize=True)
    print(f"{len(frames)} frames, {distance:.1f} m, {args.output.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
