"""Steps of Adam against those of PyTorch's optimiser, to the last bit."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from torch import nn

from sb3_trpo_ext.optim.adam import adam_step

#: With sizes that do and do not fill the registers of a processor.
SHAPES = [(16, 8), (16,), (7, 16), (7,), (1, 7), (1,)]


def make_params() -> list[nn.Parameter]:
    """The same parameters each time."""
    th.manual_seed(0)
    return [nn.Parameter(th.randn(shape)) for shape in SHAPES]


def take_steps(params: list[nn.Parameter], step: Callable[[], Any], n_steps: int, seed: int = 1) -> None:
    """Some steps with random gradients of different sizes, in new tensors each time."""
    generator = th.Generator().manual_seed(seed)
    for _ in range(n_steps):
        for param in params:
            param.grad = th.randn(param.shape, generator=generator) * 10 ** th.randn((), generator=generator)
        step()


def assert_same(ours: th.optim.Optimizer, theirs: th.optim.Optimizer) -> None:
    """Parameters and state dicts are equal bit by bit."""
    for mine, other in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        assert th.equal(mine, other)
    states, expected = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert states.keys() == expected.keys() and len(states) == len(SHAPES)
    for index, state in expected.items():
        assert states[index].keys() == state.keys()
        assert all(th.equal(states[index][name], value) for name, value in state.items())


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "weight_decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True},
    "betas_and_eps": {"betas": (0.8, 0.99), "eps": 1e-3},
    "unfused": {"fused": False},
    "foreach": {"fused": False, "foreach": True},
}


@pytest.mark.parametrize("kind", [th.optim.Adam, th.optim.AdamW])
@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_are_those_of_the_optimizer(kind: type[th.optim.Adam], variant: str) -> None:
    options = {"lr": 0.01, "fused": True, **VARIANTS[variant]}
    ours, theirs = kind(make_params(), **options), kind(make_params(), **options)
    for n_steps in (1, 3):
        take_steps(ours.param_groups[0]["params"], adam_step(ours), n_steps)
        take_steps(theirs.param_groups[0]["params"], theirs.step, n_steps)
    assert ours.state_dict()["state"][0]["step"] == 4
    assert_same(ours, theirs)

    # Another learning rate, and a state from elsewhere, with its `step` tensors
    saved = copy.deepcopy(theirs.state_dict())
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(copy.deepcopy(saved))
        optimizer.param_groups[0]["lr"] = 0.003
    take_steps(ours.param_groups[0]["params"], adam_step(ours), 3, seed=2)
    take_steps(theirs.param_groups[0]["params"], theirs.step, 3, seed=2)
    assert ours.state_dict()["state"][0]["step"] == 7
    assert_same(ours, theirs)


class Counting(th.optim.Adam):
    """An optimiser of a user's own."""

    n_steps = 0

    def step(self, closure: Any = None) -> Any:
        """Count, and take the step."""
        self.n_steps += 1
        return super().step(closure)


@pytest.fixture
def step_calls(monkeypatch: pytest.MonkeyPatch) -> list[th.optim.Optimizer]:
    """Whose own steps were taken, call by call."""
    calls: list[th.optim.Optimizer] = []
    step = th.optim.Adam.step

    def counted(self: th.optim.Adam) -> Any:
        calls.append(self)
        return step(self)

    monkeypatch.setattr(th.optim.Adam, "step", counted)
    return calls


def test_fused_adam_makes_only_the_first_step_itself(step_calls: list[th.optim.Optimizer]) -> None:
    """Were it not so, nothing would be saved, and no other test would tell."""
    optimizer = th.optim.Adam(make_params(), fused=True)
    take_steps(optimizer.param_groups[0]["params"], adam_step(optimizer), 5)
    assert step_calls == [optimizer]


def test_other_optimizers_make_all_their_steps() -> None:
    optimizer = Counting(make_params(), fused=True)
    take_steps(optimizer.param_groups[0]["params"], adam_step(optimizer), 5)
    assert optimizer.n_steps == 5


def test_a_hook_is_called_at_every_step() -> None:
    optimizer = th.optim.Adam(make_params(), fused=True)
    calls: list[Any] = []
    optimizer.register_step_post_hook(lambda *args: calls.append(args))
    take_steps(optimizer.param_groups[0]["params"], adam_step(optimizer), 5)
    assert len(calls) == 5


def test_a_scheduler_sees_every_step(step_calls: list[th.optim.Optimizer]) -> None:
    """It puts a function of its own into the place of the optimiser's."""
    optimizer = th.optim.Adam(make_params(), fused=True)
    th.optim.lr_scheduler.StepLR(optimizer, 2)
    take_steps(optimizer.param_groups[0]["params"], adam_step(optimizer), 5)
    assert len(step_calls) == 5
