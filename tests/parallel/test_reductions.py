"""Reductions and updates over two real processes."""

from pathlib import Path
from typing import Any

import pytest
import torch as th
import torch.distributed as dist
from helpers import Dense, ScriptedProblem, relative_error
from interpreters import Interpreter, run_processes
from torch import nn

from sb3_trpo_ext.optim import (
    Averaged,
    KLConstraint,
    LinearOperator,
    MlpFisher,
    MlpJacobian,
    Problem,
)
from sb3_trpo_ext.optim.vectors import assign_, flatten
from sb3_trpo_ext.parallel.reductions import Shares, is_parallel

N_PROCESSES = 2
N_SAMPLES = 8


def make_problem(half: int | None = None, cost: float = 0) -> Problem:
    """
    A Gaussian policy of unit variance whose mean is a small network, always the same.

    :param half: which half of the samples to take, or ``None`` for all
    :param cost: what the preconditioner is said to cost
    """
    generator = th.Generator().manual_seed(0)

    def random(*shape: int) -> th.Tensor:
        return th.randn(*shape, generator=generator, dtype=th.float64)

    samples = slice(None) if half is None else slice(half * N_SAMPLES // 2, (half + 1) * N_SAMPLES // 2)
    inputs, noise, advantages, score = (random(N_SAMPLES, size)[samples] for size in (2, 1, 1, 1))
    layers = [nn.Linear(2, 3, dtype=th.float64), nn.Linear(3, 1, dtype=th.float64)]
    params = [param for layer in layers for param in layer.parameters()]
    assign_(params, random(sum(param.numel() for param in params)))

    def mean() -> th.Tensor:
        return layers[1](th.tanh(layers[0](inputs)))

    old = mean().detach()

    def evaluate(indices: th.Tensor | None) -> tuple[th.Tensor, th.Tensor]:
        assert indices is None
        shift = mean() - old
        return (th.exp(noise * shift - shift**2 / 2) * advantages).mean(), (shift**2 / 2).mean()

    class Fisher(MlpFisher):
        @property
        def preconditioner_cost(self) -> float:
            return cost

    def fisher() -> LinearOperator:
        jacobian = MlpJacobian(inputs, layers, [nn.Tanh()], params)
        return Fisher(jacobian, lambda tangents: tangents, lambda: score, Shares())

    return ScriptedProblem(params, len(inputs), evaluate, fisher)


def update(problem: Problem, precondition: bool) -> tuple[th.Tensor, dict[str, Any]]:
    """The parameters after an update by so few products that the preconditioner makes a difference, and what happened."""
    result = KLConstraint(cg_max_steps=2, precondition=precondition).update(problem, 0.01)
    return flatten(problem.params), {**result._asdict(), "status": str(result.status)}


def one_process_of_two(rank: int, folder: str) -> None:
    """Write down what this process sees of each reduction."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=N_PROCESSES)
    tensor = th.tensor([1.0, 2.0]) * (rank + 1)
    mean = Shares().mean(tensor)
    product = Averaged(Dense(th.eye(2) * (1 + 4 * rank)), Shares()) @ th.ones(2)
    th.save(
        {
            "is_parallel": is_parallel(),
            "tensor": tensor,
            "mean": mean,
            "product": product,
            # Left to themselves, one process would build the preconditioner at once, and the other never
            "own_costs": update(make_problem(rank, cost=4 * rank), True),
            "updates": {precondition: update(make_problem(rank), precondition) for precondition in (False, True)},
        },
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, sb3_interpreter: Interpreter) -> list[dict[str, Any]]:
    """What two processes, each with half of the samples, have written down."""
    folder: Path = tmp_path_factory.mktemp("processes")
    run_processes(sb3_interpreter, "test_reductions", folder, N_PROCESSES)
    return [th.load(folder / f"{rank}.pt") for rank in range(N_PROCESSES)]


def test_mean_over_processes_leaves_its_argument_alone(outcomes: list[dict[str, Any]]) -> None:
    for rank, outcome in enumerate(outcomes):
        assert outcome["is_parallel"]
        assert outcome["mean"].tolist() == [1.5, 3.0]
        assert outcome["tensor"].tolist() == [1.0 + rank, 2.0 + 2 * rank]


def test_processes_agree_on_when_to_build_the_preconditioner(outcomes: list[dict[str, Any]]) -> None:
    (first, facts), (second, _) = (outcome["own_costs"] for outcome in outcomes)
    assert th.equal(first, second)
    expected, expected_facts = update(make_problem(cost=2), True)
    assert relative_error(first, expected) < 1e-10
    assert facts["cg_steps"] == expected_facts["cg_steps"]


def test_averaged_is_the_mean_of_the_operators(outcomes: list[dict[str, Any]]) -> None:
    assert [outcome["product"].tolist() for outcome in outcomes] == [[3.0, 3.0]] * N_PROCESSES


@pytest.mark.parametrize("precondition", [False, True])
def test_two_processes_take_the_step_of_one_with_all_samples(outcomes: list[dict[str, Any]], precondition: bool) -> None:
    start = flatten(make_problem().params)
    params, facts = update(make_problem(), precondition)
    assert facts["status"] == "accepted"
    (first, first_facts), (second, second_facts) = (outcome["updates"][precondition] for outcome in outcomes)
    # The processes must not drift apart by a single bit
    assert th.equal(first, second)
    assert repr(first_facts) == repr(second_facts)  # a NaN is not equal to itself
    assert relative_error(first - start, params - start) < 1e-10
    for name, expected in facts.items():
        if name not in ("status", "beta"):
            assert first_facts[name] == pytest.approx(expected, rel=1e-8, nan_ok=True), name


def test_a_preconditioner_makes_a_difference_to_these_updates() -> None:
    """Without one, the test above would not show that it is the same on both processes."""
    assert relative_error(*(update(make_problem(), precondition)[0] for precondition in (True, False))) > 1e-3


def test_one_process_needs_no_process_group() -> None:
    tensor = th.ones(2)
    assert not is_parallel()
    assert Shares().mean(tensor) is tensor
