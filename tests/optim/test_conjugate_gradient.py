"""Conjugate gradient against a direct solver, and what it says where there is nothing to solve."""

import importlib
import math
from collections.abc import Callable

import pytest
import torch as th
from helpers import Dense, relative_error

from sb3_trpo_ext.optim import CGResult, CGStatus, LinearOperator, conjugate_gradient

pytestmark = pytest.mark.usefixtures("float64")

N = 12


def positive_definite(condition: float, n: int = N) -> th.Tensor:
    """A random symmetric matrix with eigenvalues from 1 to ``condition``, evenly spread on a logarithmic scale."""
    basis, _ = th.linalg.qr(th.randn(n, n))
    return basis @ th.diag(th.logspace(0, math.log10(condition), n)) @ basis.T


class Scripted(LinearOperator):
    """The identity times a number of its own for each product; the last number counts for all further ones."""

    def __init__(self, *factors: float):
        self.factors = list(factors)
        self.n_products = 0

    def __matmul__(self, vector: th.Tensor) -> th.Tensor:
        factor = self.factors[min(self.n_products, len(self.factors) - 1)]
        self.n_products += 1
        return factor * vector


class FailingAt(Dense):
    """A matrix whose k-th product, counted from 1, has one entry replaced."""

    def __init__(self, matrix: th.Tensor, k: int, entry: float):
        super().__init__(matrix)
        self.k = k
        self.entry = entry

    def __matmul__(self, vector: th.Tensor) -> th.Tensor:
        result = super().__matmul__(vector)
        if self.n_products == self.k:
            result = result.clone()
            result[3] = self.entry
        return result


@pytest.mark.parametrize("is_preconditioned", [False, True])
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3, 1e6])
def test_solution_is_that_of_a_direct_solver(condition: float, is_preconditioned: bool) -> None:
    matrix, b = positive_definite(condition), th.randn(N)
    # Any positive definite preconditioner changes the way, not the goal
    preconditioner = Dense(positive_definite(3.0)) if is_preconditioned else None
    operator = Dense(matrix)

    result = conjugate_gradient(operator, b, 1000, 1e-10, preconditioner)

    assert result.status == CGStatus.CONVERGED
    assert result.residual_norm <= 1e-10
    assert result.n_steps == operator.n_products
    # The residual bounds the error times the smallest eigenvalue, which is 1
    assert relative_error(result.x, th.linalg.solve(matrix, b)) < 1e-9 * condition
    assert result.curvature == pytest.approx(float(result.x @ matrix @ result.x), rel=1e-9)


def test_inverse_as_preconditioner_needs_one_step() -> None:
    matrix, b = positive_definite(1e4), th.randn(N)
    inverse = th.linalg.inv(matrix)
    result = conjugate_gradient(Dense(matrix), b, 10, 1e-8, Dense(inverse))
    assert (result.status, result.n_steps) == (CGStatus.CONVERGED, 1)
    assert relative_error(result.x, inverse @ b) < 1e-10


@pytest.mark.parametrize("n_steps", [1, 2, 5])
@pytest.mark.parametrize("is_preconditioned", [False, True])
def test_iterate_is_the_best_in_the_krylov_space(n_steps: int, is_preconditioned: bool) -> None:
    """The defining property: after k steps the error is the smallest possible in the norm of A."""
    matrix, b = positive_definite(1e3), th.randn(N)
    inverse = positive_definite(5.0) if is_preconditioned else th.eye(N)
    krylov = [inverse @ b]
    for _ in range(n_steps - 1):
        krylov.append(inverse @ (matrix @ krylov[-1]))
    basis, _ = th.linalg.qr(th.stack(krylov, dim=1))
    expected = basis @ th.linalg.solve(basis.T @ matrix @ basis, basis.T @ b)

    result = conjugate_gradient(Dense(matrix), b, n_steps, 0.0, Dense(inverse) if is_preconditioned else None)

    assert (result.status, result.n_steps) == (CGStatus.MAX_STEPS, n_steps)
    assert relative_error(result.x, expected) < 1e-9
    assert result.curvature == pytest.approx(float(result.x @ matrix @ result.x), rel=1e-9)
    residual = b - matrix @ result.x
    norm = float(((residual @ inverse @ residual) / (b @ inverse @ b)).sqrt())
    assert result.residual_norm == pytest.approx(norm, rel=1e-9)


@pytest.mark.parametrize("tolerance", [0.5, 1e-1, 1e-3])
def test_ends_with_the_first_iterate_within_the_tolerance(tolerance: float) -> None:
    matrix, b = positive_definite(1e3), th.randn(N)
    result = conjugate_gradient(Dense(matrix), b, 100, tolerance)
    one_less = conjugate_gradient(Dense(matrix), b, result.n_steps - 1, tolerance)
    assert result.status == CGStatus.CONVERGED
    assert result.residual_norm <= tolerance < one_less.residual_norm
    assert one_less.status == CGStatus.MAX_STEPS


@pytest.mark.parametrize("scale", [2.0**-300, 2.0**-20, 2.0**20, 2.0**300])
@pytest.mark.parametrize("of", ["b", "operator"])
def test_tolerance_is_relative(scale: float, of: str) -> None:
    matrix, b = positive_definite(1e3), th.randn(N)
    reference = conjugate_gradient(Dense(matrix), b, 100, 1e-3)
    if of == "b":
        result = conjugate_gradient(Dense(matrix), b * scale, 100, 1e-3)
        expected = reference.x * scale
    else:
        result = conjugate_gradient(Dense(matrix * scale), b, 100, 1e-3)
        expected = reference.x / scale
    # Multiplications by powers of two are exact, so all is equal to the last bit
    assert th.equal(result.x, expected)
    assert result[2:5] == reference[2:5]


def test_zero_is_solved_by_zero_without_a_product() -> None:
    operator = Dense(positive_definite(10.0))
    result = conjugate_gradient(operator, th.zeros(N), 10, 1e-3)
    assert th.equal(result.x, th.zeros(N))
    assert result[1:5] == (0.0, 0.0, 0, CGStatus.CONVERGED)
    assert operator.n_products == 0


@pytest.mark.parametrize("good_steps", [0, 1, 4])
def test_negative_curvature_is_reported_when_it_is_met(good_steps: int) -> None:
    matrix = th.diag(th.tensor([*range(1, good_steps + 1), -1.0]))
    # Nearly blind to the negative direction if there are others, so that it is met in the last step only
    b = th.tensor([1.0] * good_steps + [1e-4])
    result = conjugate_gradient(Dense(matrix), b, 10, 0.0)
    before = conjugate_gradient(Dense(matrix), b, good_steps, 0.0)
    assert (result.status, result.n_steps) == (CGStatus.NON_POSITIVE_CURVATURE, good_steps)
    assert th.equal(result.x, before.x)


def test_no_curvature_at_all_is_reported() -> None:
    result = conjugate_gradient(Dense(th.zeros(N, N)), th.ones(N), 10, 1e-3)
    assert (result.status, result.n_steps) == (CGStatus.NON_POSITIVE_CURVATURE, 0)


@pytest.mark.parametrize("entry", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_non_finite_product_ends_it_with_the_iterate_before(k: int, entry: float) -> None:
    matrix, b = positive_definite(1e3), th.randn(N)
    result = conjugate_gradient(FailingAt(matrix, k, entry), b, 10, 1e-12)
    before = conjugate_gradient(Dense(matrix), b, k - 1, 1e-12)
    assert (result.status, result.n_steps) == (CGStatus.NON_FINITE, k - 1)
    assert th.equal(result.x, before.x)


def test_non_finite_entry_is_seen_even_where_the_search_direction_is_zero() -> None:
    b = th.ones(N)
    b[3] = 0.0
    assert conjugate_gradient(FailingAt(th.eye(N), 1, math.nan), b, 10, 1e-12).status == CGStatus.NON_FINITE


@pytest.mark.parametrize("entry", [math.nan, math.inf])
def test_non_finite_right_hand_side_is_reported_without_a_product(entry: float) -> None:
    operator, b = Dense(th.eye(N)), th.ones(N)
    b[0] = entry
    result = conjugate_gradient(operator, b, 10, 1e-3)
    assert (result.status, result.n_steps, operator.n_products) == (CGStatus.NON_FINITE, 0, 0)


def test_non_finite_preconditioner_is_reported() -> None:
    result = conjugate_gradient(Dense(th.eye(N)), th.ones(N), 10, 1e-3, Dense(th.eye(N) * math.nan))
    assert (result.status, result.n_steps) == (CGStatus.NON_FINITE, 0)


def test_overflow_of_the_solution_is_reported() -> None:
    result = conjugate_gradient(Scripted(1e-200), th.full((N,), 1e120), 10, 1e-3)
    assert result.status == CGStatus.NON_FINITE


def test_uses_no_random_numbers_and_is_reproducible() -> None:
    matrix, b = positive_definite(1e3), th.randn(N)
    state = th.get_rng_state()
    first, second = (conjugate_gradient(Dense(matrix), b, 7, 1e-6) for _ in range(2))
    assert th.equal(th.get_rng_state(), state)
    assert th.equal(first.x, second.x)


def test_does_not_write_into_its_arguments() -> None:
    b = th.randn(N)
    before = b.clone()
    conjugate_gradient(Dense(positive_definite(1e3)), b, 7, 1e-6)
    assert th.equal(b, before)


SITUATIONS: dict[str, Callable[[], CGResult]] = {
    "converged": lambda: conjugate_gradient(Dense(positive_definite(10.0)), th.randn(N), 30, 1e-6),
    "max_steps": lambda: conjugate_gradient(Dense(positive_definite(1e4)), th.randn(N), 5, 1e-6),
    "zero": lambda: conjugate_gradient(Dense(positive_definite(10.0)), th.zeros(N), 5, 1e-6),
    "exact": lambda: conjugate_gradient(Scripted(2.0), th.ones(N), 5, 0.0),
    "preconditioned": lambda: conjugate_gradient(Dense(positive_definite(10.0)), th.randn(N), 30, 1e-6, Dense(2 * th.eye(N))),
    "negative": lambda: conjugate_gradient(Scripted(-1.0), th.randn(N), 5, 1e-6),
    "negative_then_positive": lambda: conjugate_gradient(Scripted(-1.0, 1.0), th.randn(N), 5, 1e-6),
    "negative_then_nan": lambda: conjugate_gradient(Scripted(-1.0, math.nan), th.randn(N), 5, 1e-6),
    "converged_then_nan": lambda: conjugate_gradient(Scripted(1.0, math.nan), th.randn(N), 5, 1e-6),
    "converged_then_negative": lambda: conjugate_gradient(Scripted(1.0, -1.0), th.randn(N), 5, 1e-6),
    "nan_later": lambda: conjugate_gradient(FailingAt(positive_definite(1e3), 3, math.nan), th.randn(N), 9, 1e-9),
    "inf_later": lambda: conjugate_gradient(FailingAt(positive_definite(1e3), 3, math.inf), th.randn(N), 9, 1e-9),
    "nan_right_hand_side": lambda: conjugate_gradient(Scripted(1.0), th.full((N,), math.nan), 5, 1e-6),
    "overflow": lambda: conjugate_gradient(Scripted(1e-200), th.full((N,), 1e120), 5, 1e-6),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_frozen_iterate_of_an_accelerator_is_that_of_an_early_exit(situation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The name of the module is also that of the function that the package exports
    module = importlib.import_module("sb3_trpo_ext.optim.conjugate_gradient")
    th.manual_seed(1)
    early = SITUATIONS[situation]()
    monkeypatch.setattr(module, "_is_free_to_read", lambda _: False)
    th.manual_seed(1)
    frozen = SITUATIONS[situation]()
    assert th.equal(frozen.x.nan_to_num(), early.x.nan_to_num())
    assert repr(frozen[1:]) == repr(early[1:])  # a NaN is not equal to itself


def test_an_accelerator_makes_all_products_and_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("sb3_trpo_ext.optim.conjugate_gradient")
    monkeypatch.setattr(module, "_is_free_to_read", lambda _: False)
    operator = Dense(positive_definite(10.0))
    result = conjugate_gradient(operator, th.randn(N), 40, 1e-3)
    assert result.n_steps < operator.n_products == 40


@pytest.mark.parametrize("n_first", [0, 1, 3, 40])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_second_run_goes_on_where_the_first_stopped(n_first: int, preconditioned: bool) -> None:
    matrix, b = positive_definite(1e3), th.randn(N)
    operator = Dense(matrix)
    inverse = Dense(th.diag(1 / matrix.diagonal())) if preconditioned else None
    first = conjugate_gradient(operator, b, n_first, 1e-6)
    assert relative_error(first.residual, b - matrix @ first.x) < 1e-9 or first.residual.norm() < 1e-6 * b.norm()
    n_products = operator.n_products
    second = conjugate_gradient(operator, b, 200, 1e-6, inverse, start=first)
    assert second.status is CGStatus.CONVERGED
    assert operator.n_products == second.n_steps
    n_second = operator.n_products - n_products
    residual = b - matrix @ second.x
    weight = th.ones(N) if inverse is None else inverse @ th.ones(N)
    assert (residual * weight * residual).sum().sqrt() <= 1.01e-6 * (b * weight * b).sum().sqrt()
    # Relative to b, and not to where the second run started
    assert second.residual_norm <= 1e-6
    assert second.curvature == pytest.approx((second.x @ matrix @ second.x).item(), rel=1e-9)
    if first.status is CGStatus.CONVERGED and not preconditioned:
        assert n_second == 0
        assert th.equal(second.x, first.x)
