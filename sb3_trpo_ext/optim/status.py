"""How something ended: a code for averages and plots, a name and advice for people."""

from enum import IntEnum


class Status(IntEnum):
    """
    Base of enumerations whose members are pairs of a code and advice.

    A member is an int, so that all logged values can be averaged or cast; ``str()`` of it is its name.
    """

    #: What to do about it; empty where it is a normal outcome.
    advice: str

    def __new__(cls, code: int, advice: str = "") -> "Status":
        """Make a member."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.advice = advice
        return member

    def __str__(self) -> str:
        return self.name.lower()


class UpdateStatus(Status):
    """How a policy update ended; every one but the first leaves the parameters bit-identical."""

    ACCEPTED = 0
    KL_TOO_LARGE = 1
    NO_IMPROVEMENT = 2
    NON_FINITE = 3, "no step within the trust region gave finite numbers: look for extreme observations, or lower `target_kl`"
    ZERO_GRADIENT = 4
    NON_FINITE_OBJECTIVE = 5, "check the environment's observations and rewards for NaN and infinity"
    NON_FINITE_GRADIENT = 6, "check the environment's observations and rewards for NaN and infinity"
    CG_NON_POSITIVE_CURVATURE = 7, "the Fisher matrix is not positive definite in the arithmetic used: raise `cg_damping`"
    CG_NON_FINITE = 8, "a product with the Fisher matrix is not finite: look for extreme observations, or raise `cg_damping`"
    NO_CURVATURE = 9, "the KL does not change along the step, so that nothing bounds its length: raise `cg_damping`"
    ZERO_TARGET_KL = 10
    NOTHING_TO_TRAIN = 11
