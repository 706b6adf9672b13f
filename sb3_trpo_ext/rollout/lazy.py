"""Lazy tensors and a lazy buffer, for a callback that looks at what a rollout computes only at its end."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback

#: Arrays of a rollout buffer that are computed when they are read.
_LAZY_ARRAYS = ("values", "log_probs", "rewards")


class LazyTensor(th.Tensor):
    """A placeholder for a tensor that is computed when it is first used."""

    #: Returns the tensor, always the same one.
    source: Callable[[], th.Tensor]

    @staticmethod
    def of(source: Callable[[], th.Tensor], shape: tuple[int, ...], device: th.device) -> "LazyTensor":
        """Make a placeholder for the tensor of type float32, of this shape and on this device, that ``source`` returns."""
        tensor: LazyTensor = th.Tensor._make_wrapper_subclass(LazyTensor, shape, dtype=th.float32, device=device)
        tensor.source = source
        return tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function, method or attribute of PyTorch on the tensors themselves."""
        return func(*_present(args), **_present(kwargs or {}))

    # What Python does not see of PyTorch, such as `th.tensor(values)` and compiled functions
    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]


def _present(value: Any) -> Any:
    """Replace placeholders by their tensors."""
    if isinstance(value, LazyTensor):
        return value.source()
    if type(value) in (list, tuple):
        return type(value)(_present(part) for part in value)
    if type(value) is dict:
        return {key: _present(part) for key, part in value.items()}
    return value


class LazySteps:
    """
    Values and log-probabilities of the steps of a rollout.

    :param evaluate: values and log-probabilities of one step, of shapes ``(n_envs, 1)`` and ``(n_envs,)``
    """

    def __init__(self, evaluate: Callable[[int], tuple[th.Tensor, th.Tensor]]):
        self._evaluate = evaluate
        #: The current step if a callback may read it, its values and log-probabilities once it has, and what computes them.
        self._current: tuple[int, list[th.Tensor], Callable[[], Any]] | None = None
        #: Values and log-probabilities of steps that a callback has read.
        self._seen: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def at(self, step: int, n_envs: int, device: th.device) -> tuple[LazyTensor, LazyTensor]:
        """Values and log-probabilities of the current step: lazy tensors of shapes ``(n_envs, 1)`` and ``(n_envs,)``."""
        pair: list[th.Tensor] = []

        def look() -> list[th.Tensor]:
            # Once: what a callback has changed in place must stay
            if not pair:
                pair.extend(self._evaluate(step))
            return pair

        self._current = step, pair, look
        return LazyTensor.of(lambda: look()[0], (n_envs, 1), device), LazyTensor.of(lambda: look()[1], (n_envs,), device)

    def keep(self, must_look: bool = False) -> None:
        """End the current step: changes that a callback has made to its tensors in place go into the buffer, as in SB3."""
        if self._current is None:
            return
        (step, pair, look), self._current = self._current, None
        if must_look:
            look()
        elif pair:
            values, log_probs = pair
            self._seen[step] = values.flatten().cpu().numpy().copy(), log_probs.cpu().numpy().copy()

    def write(self, values: np.ndarray, log_probs: np.ndarray) -> None:
        """Write the steps that a callback has read into the buffer's arrays, of shape ``(n_steps, n_envs)``."""
        for step, pair in self._seen.items():
            values[step], log_probs[step] = pair
        self._seen.clear()

    def finish(self, values: np.ndarray, log_probs: np.ndarray, device: th.device) -> None:
        """End a rollout: tensors that a callback has kept are now read from these arrays, which do not change any more."""
        self._evaluate = functools.partial(stored_step, values, log_probs, device=device)


def stored_step(values: np.ndarray, log_probs: np.ndarray, step: int, device: th.device) -> tuple[th.Tensor, th.Tensor]:
    """Copy one step of the buffer's arrays: values of shape ``(n_envs, 1)``, log-probabilities of shape ``(n_envs,)``."""
    return th.tensor(values[step, :, None], device=device), th.tensor(log_probs[step], device=device)


def may_look(callback: Any) -> bool:
    """Whether a callback may look at values and log-probabilities: those of SB3, RL-Zoo and this package do not."""
    if isinstance(callback, ConvertCallback) and callback.callback is not None:
        return True
    if type(callback).__module__.partition(".")[0] not in ("stable_baselines3", "sb3_contrib", "rl_zoo3", "sb3_trpo_ext"):
        return True
    inner = [value for name, value in vars(callback).items() if name != "parent"]
    inner += [part for value in inner if isinstance(value, list) for part in value]
    return any(isinstance(value, BaseCallback) and may_look(value) for value in inner)


@contextmanager
def lazy_buffer(buffer: RolloutBuffer, evaluate: Callable[[], None]) -> Iterator[None]:
    """Let a buffer call ``evaluate`` whenever its values, log-probabilities or rewards are read."""
    original = type(buffer)
    vars(buffer)["_evaluate"] = evaluate
    buffer.__class__ = _lazy_class(original)
    try:
        yield
    finally:
        buffer.__class__ = original
        del vars(buffer)["_evaluate"]


@functools.cache
def _lazy_class(original: type[RolloutBuffer]) -> type[RolloutBuffer]:
    """The class that a buffer has during a rollout."""

    def reduce(self: Any, _: Any) -> Any:
        vars(self)["_evaluate"]()
        state = {name: value for name, value in vars(self).items() if name != "_evaluate"}
        # A copy and a pickle are of the original class
        return object.__new__, (original,), state

    members: dict[str, Any] = {name: _lazy_array(name) for name in _LAZY_ARRAYS}
    return type(original.__name__, (original,), {**members, "__reduce_ex__": reduce, "__module__": original.__module__})


def _lazy_array(name: str) -> property:
    """An array that is computed when it is read."""

    def get(self: Any) -> Any:
        vars(self)["_evaluate"]()
        return vars(self)[name]

    return property(get, lambda self, array: vars(self).update({name: array}))
