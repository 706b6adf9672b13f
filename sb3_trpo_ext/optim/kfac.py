"""The Fisher matrix of a multilayer perceptron, and its Kronecker-factored preconditioner for conjugate gradient."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch as th

from sb3_trpo_ext.optim.devices import sent_to
from sb3_trpo_ext.optim.mlp import MlpJacobian
from sb3_trpo_ext.optim.operators import GaussNewtonFisher, LinearOperator, OutputFisher
from sb3_trpo_ext.optim.vectors import flatten, unflatten
from sb3_trpo_ext.parallel.reductions import Shares

#: Cost of an eigendecomposition of an n x n matrix, in units of n^3 operations at the rate of matrix products. Measured on
#: two cores: 4 ms at n = 349, where that rate was 190 GFLOP/s.
_EIGH_OPERATIONS = 20
#: How many times faster an accelerator multiplies matrices than the host, which decomposes them for it. An estimate: 5 T
#: multiply-adds per second over the rate above. So a preconditioner pays there for large batches only.
_ACCELERATOR_SPEED = 50


class _Block(NamedTuple):
    """One layer's block in the eigenbasis of its two factors."""

    #: Eigenvectors of the output factor G as columns, shape ``(n_out, n_out)``.
    output_basis: th.Tensor
    #: Eigenvectors of the input factor A as columns, shape ``(n_in, n_in)``.
    input_basis: th.Tensor
    #: ``1 / (eigenvalue of G * eigenvalue of A + damping)``, shape ``(n_out, n_in)``.
    scale: th.Tensor


class MlpFisher(GaussNewtonFisher):
    """
    The Fisher matrix of a multilayer perceptron, with :class:`KroneckerPreconditioner`.

    :param jacobian: of the policy on the batch
    :param output_fisher: maps tangents of the statistics to cotangents, sample by sample
    :param sample_score: draws a cotangent of the output, of shape ``(n_samples, n_outputs)``, whose covariance per sample is
        the output-space Fisher matrix; may return ``None`` if it cannot
    :param shares: what each process counts in the means over samples
    """

    jacobian: MlpJacobian

    def __init__(
        self, jacobian: MlpJacobian, output_fisher: OutputFisher, sample_score: Callable[[], th.Tensor | None], shares: Shares
    ):
        super().__init__(jacobian, output_fisher)
        self._sample_score = sample_score
        self._shares = shares

    @property
    def preconditioner_cost(self) -> float:
        """Cost of building it over that of one product, both in floating-point operations, rounded up."""
        jacobian = self.jacobian
        build, product = 0.0, 0.0
        eigh_operations = _EIGH_OPERATIONS * (1 if jacobian.output.device.type == "cpu" else _ACCELERATOR_SPEED)
        for index, (n_out, n_in) in enumerate(jacobian.layer_shapes()):
            build += 2 * jacobian.n_samples * (n_in**2 + n_out**2) + eigh_operations * (n_in**3 + n_out**3)
            # Two matrix products at the first layer; four at every other, where a tangent and a cotangent go through
            product += 2 * jacobian.n_samples * n_in * n_out * (2 if index == 0 else 4)
        return math.ceil(build / product)

    def preconditioner(self, damping: float) -> LinearOperator | None:
        """``None`` if no score can be sampled, or if a factor is not finite."""
        score = self._sample_score()
        if score is None:
            return None
        try:
            return KroneckerPreconditioner(self.jacobian, self._output_fisher, score, damping, self._shares)
        except th.linalg.LinAlgError:  # type: ignore[attr-defined]
            # The square of an observation of 1e20 is infinite in single precision, and has no eigenvalues
            return None


class KroneckerPreconditioner(LinearOperator):
    """
    An approximate inverse of ``F + damping I`` for a multilayer perceptron (Martens & Grosse 2015, K-FAC).

    Layer by layer, F is approximated by ``A (x) G`` with ``A = mean(h h^T)`` of the layer's inputs (and a 1 for the bias)
    and ``G = mean(g g^T)`` of the cotangents at its output. There g is the score of an action sampled from the policy; at the
    last layer G is the mean output-space Fisher matrix itself. The block of the log std is exact.

    Damping enters exactly, in the eigenbasis of the two factors (as in George et al. 2018), and not by adding a share of it
    to each factor (Martens & Grosse 2015, section 6.3): both were measured, the eigenbasis saves one or two Fisher-vector
    products and costs less than one. Symmetric positive definite for any positive damping, so that conjugate gradient stays
    exact: the preconditioner changes how fast it converges, not to what. The factors are averaged over all processes: with
    one preconditioner for each of them, they would take different steps. From an accelerator the factors make one round trip
    to the host for their eigenvectors: a GPU is slow at a few matrices of this size (1.8 ms for 100 x 100, PyTorch's
    issue 174674), and not every accelerator has a routine for it.

    :param jacobian: of the policy on the batch
    :param output_fisher: maps tangents of the statistics to cotangents, sample by sample
    :param score: cotangent of the output, of shape ``(n_samples, n_outputs)``, whose covariance per sample is the output-space
        Fisher matrix
    :param damping: added to F; positive
    :param shares: what each process counts in the means over samples
    """

    def __init__(self, jacobian: MlpJacobian, output_fisher: OutputFisher, score: th.Tensor, damping: float, shares: Shares):
        self._jacobian = jacobian
        # The last layer's cotangent is the score itself, for which there is something better
        sources = [*jacobian.layer_inputs(), *jacobian.layer_cotangents(score)[:-1]]
        factors = [source.t() @ source / jacobian.n_samples for source in sources]
        zeros = [score.new_zeros(len(score), jacobian.n_stds)] if jacobian.n_stds else []
        basis = th.eye(score.shape[1], dtype=score.dtype, device=score.device)
        columns = [output_fisher((row.expand_as(score), *zeros))[0].mean(dim=0) for row in basis]
        factors.append(th.stack(columns, dim=1))
        if jacobian.n_stds:
            factors.append(output_fisher((th.zeros_like(score), th.ones_like(zeros[0])))[1].mean(dim=0))
        means = list(shares.means(factors))
        self._log_std_scale: th.Tensor | None = 1 / (means.pop() + damping) if jacobian.n_stds else None
        eigen = _eigen(means)
        n_layers = len(eigen) // 2
        self._blocks: list[_Block] = []
        for (input_values, input_basis), (output_values, output_basis) in zip(eigen[:n_layers], eigen[n_layers:], strict=True):
            # Rounding makes the smallest eigenvalues of a singular factor slightly negative
            eigenvalues = output_values.clamp(min=0)[:, None] * input_values.clamp(min=0)
            self._blocks.append(_Block(output_basis, input_basis, 1 / (eigenvalues + damping)))

    @th.no_grad()
    def __matmul__(self, vector: th.Tensor) -> th.Tensor:
        matrices, log_std = self._jacobian.to_layers(vector)
        solved = []
        for matrix, (output_basis, input_basis, scale) in zip(matrices, self._blocks, strict=True):
            rotated = output_basis.t() @ matrix @ input_basis
            solved.append(output_basis @ rotated.mul_(scale) @ input_basis.t())
        if log_std is not None and self._log_std_scale is not None:
            log_std = log_std * self._log_std_scale
        return self._jacobian.from_layers(solved, log_std)


def _eigen(matrices: Sequence[th.Tensor]) -> list[tuple[th.Tensor, th.Tensor]]:
    """Eigenvalues and eigenvectors of symmetric matrices, computed by the CPU."""
    device = matrices[0].device
    if device.type == "cpu":
        return [tuple(th.linalg.eigh(matrix)) for matrix in matrices]
    on_host = unflatten(flatten(matrices).cpu(), matrices)
    found = [part for matrix in on_host for part in th.linalg.eigh(matrix)]
    parts = unflatten(sent_to(device, flatten(found)), found)
    return list(zip(parts[::2], parts[1::2], strict=True))
