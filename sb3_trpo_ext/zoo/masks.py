"""Action masks in RL-Zoo, whose scripts know none: an agent asks the environment in which it is evaluated."""

import functools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import rl_zoo3.utils
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext.maskable import MaskableTRPO

#: Where a script may have its function already.
_MODULES = ("rl_zoo3", "rl_zoo3.utils", "rl_zoo3.enjoy")
#: ``env``: the environments that RL-Zoo has made last to evaluate an agent in. A search has a thread for each trial.
_evaluations = threading.local()


class MaskedAgent(MaskableTRPO):
    """
    A ``MaskableTRPO`` for RL-Zoo's scripts, whose ``predict`` gets no masks: it asks the environments of :func:`remember`.

    Its files are those of the parent class.
    """

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """As in the parent class, with masks in any case."""
        env = getattr(_evaluations, "env", None)
        if action_masks is None and self._use_masking and env is not None:
            action_masks = get_action_masks(env)
        return super().predict(observation, state, episode_start, deterministic, action_masks)


def remember(env: VecEnv) -> VecEnv:
    """Note the environments in which an agent of this thread is evaluated, if they have masks."""
    _evaluations.env = env if is_masking_supported(env) else None
    return env


@contextmanager
def scripts_watched() -> Iterator[None]:
    """Within the block, remember the environments that RL-Zoo's scripts make with ``create_test_env``."""
    original = rl_zoo3.utils.create_test_env

    @functools.wraps(original)
    def create_test_env(*args: Any, **kwargs: Any) -> VecEnv:
        return remember(original(*args, **kwargs))

    modules = [vars(sys.modules[name]) for name in _MODULES if name in sys.modules]
    for module in modules:
        module["create_test_env"] = create_test_env
    try:
        yield
    finally:
        for module in modules:
            module["create_test_env"] = original
