"""What a rollout computes at its end, for a callback that looks at it before: tensors and a buffer that compute when asked."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback

#: Arrays of a rollout buffer that are complete only when somebody asks.
_LAZY_ARRAYS = ("values", "log_probs", "rewards")


class LazyTensor(th.Tensor):
    """The place of a tensor that is computed when anything looks at it; from then on it is that tensor."""

    #: Returns the tensor, always the same one.
    source: Callable[[], th.Tensor]

    @staticmethod
    def of(source: Callable[[], th.Tensor], shape: tuple[int, ...], device: th.device) -> "LazyTensor":
        """
        Make a place for a tensor.

        :param source: returns the tensor, of type float32
        :param shape: its shape
        :param device: where it is
        :return: its place
        """
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
    """Put tensors in their places."""
    if isinstance(value, LazyTensor):
        return value.source()
    if type(value) in (list, tuple):
        return type(value)(_present(part) for part in value)
    if type(value) is dict:
        return {key: _present(part) for key, part in value.items()}
    return value


class _Step:
    """Values and log-probabilities of one step."""

    __slots__ = ("_steps", "number", "pair")

    def __init__(self, steps: "LazySteps", number: int):
        self._steps = steps
        self.number = number
        #: Values and log-probabilities, once somebody has looked.
        self.pair: tuple[th.Tensor, th.Tensor] | None = None

    def look(self) -> tuple[th.Tensor, th.Tensor]:
        """
        Compute the step, once.

        :return: values of shape ``(n_envs, 1)`` and log-probabilities of shape ``(n_envs,)``
        """
        if self.pair is None:
            self.pair = self._steps.evaluate(self.number)
        return self.pair

    def values(self) -> th.Tensor:
        """
        The values.

        :return: shape ``(n_envs, 1)``
        """
        return self.look()[0]

    def log_probs(self) -> th.Tensor:
        """
        The log-probabilities.

        :return: shape ``(n_envs,)``
        """
        return self.look()[1]


class LazySteps:
    """
    Values and log-probabilities of the steps of a rollout.

    :param evaluate: values and log-probabilities of one step, of shapes ``(n_envs, 1)`` and ``(n_envs,)``
    """

    def __init__(self, evaluate: Callable[[int], tuple[th.Tensor, th.Tensor]]):
        self.evaluate = evaluate
        #: The present step, if somebody may look at it.
        self._present: _Step | None = None
        #: What the buffer gets of steps that somebody has looked at.
        self._seen: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def at(self, step: int, n_envs: int, device: th.device) -> tuple[LazyTensor, LazyTensor]:
        """
        Values and log-probabilities of the present step.

        :param step: number of the step
        :param n_envs: number of environments
        :param device: where the tensors are
        :return: lazy tensors of shapes ``(n_envs, 1)`` and ``(n_envs,)``
        """
        self._present = both = _Step(self, step)
        return LazyTensor.of(both.values, (n_envs, 1), device), LazyTensor.of(both.log_probs, (n_envs,), device)

    def keep(self, must_look: bool = False) -> None:
        """End the present step: what somebody has made of its tensors in place goes into the buffer, as in SB3."""
        step, self._present = self._present, None
        if step is not None and must_look:
            step.look()
        elif step is not None and step.pair is not None:
            values, log_probs = step.pair
            self._seen[step.number] = values.flatten().cpu().numpy().copy(), log_probs.cpu().numpy().copy()

    def write(self, begin: int, end: int, values: np.ndarray, log_probs: np.ndarray) -> None:
        """
        Write the steps that somebody has looked at into the buffer.

        :param begin: the first step to write
        :param end: the one after the last
        :param values: of the buffer, shape ``(n_steps, n_envs)``
        :param log_probs: the same shape
        """
        for step in range(begin, end) if self._seen else ():
            if step in self._seen:
                values[step], log_probs[step] = self._seen[step]

    def finish(self, values: np.ndarray, log_probs: np.ndarray, device: th.device) -> None:
        """
        End a rollout: a tensor that somebody has kept must not be computed with a later policy.

        :param values: of all steps that are in the buffer, shape ``(n_steps, n_envs)``; not written to any more
        :param log_probs: the same shape
        :param device: where tensors are to be
        """

        def stored(step: int) -> tuple[th.Tensor, th.Tensor]:
            return th.tensor(values[step, :, None], device=device), th.tensor(log_probs[step], device=device)

        self.evaluate = stored


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
def lazy_buffer(buffer: RolloutBuffer, complete: Callable[[], None]) -> Iterator[None]:
    """Let a buffer complete its values, log-probabilities and rewards whenever somebody asks for them."""
    original = type(buffer)
    vars(buffer)["_complete"] = complete
    buffer.__class__ = _lazy_class(original)
    try:
        yield
    finally:
        buffer.__class__ = original
        del vars(buffer)["_complete"]


@functools.cache
def _lazy_class(original: type[RolloutBuffer]) -> type[RolloutBuffer]:
    """The class that a buffer has during a rollout."""

    def reduce(self: Any, _: Any) -> Any:
        vars(self)["_complete"]()
        state = {name: value for name, value in vars(self).items() if name != "_complete"}
        # A copy and a pickle are of the original class, and complete
        return object.__new__, (original,), state

    members: dict[str, Any] = {name: _lazy_array(name) for name in _LAZY_ARRAYS}
    return type(original.__name__, (original,), {**members, "__reduce_ex__": reduce, "__module__": original.__module__})


def _lazy_array(name: str) -> property:
    """An array that is completed when somebody asks for it."""

    def get(self: Any) -> Any:
        vars(self)["_complete"]()
        return vars(self)[name]

    def put(self: Any, array: Any) -> None:
        vars(self)[name] = array

    return property(get, put)
