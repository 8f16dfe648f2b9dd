"""Laws of scales that are drawn per row and told to the network.

A scale w in the target guides by omega = 1 / (1 - w), so that a law in omega is one in
w = 1 - 1 / omega. Where several sources act on a row, what is drawn is their total.
"""

import abc
import math
import warnings

from torch import Tensor

from w2s_train.errors import UserError, require


class Drawn(abc.ABC):
    """A scale that is drawn for each row, in place of a number.

    Args:
        low: Lower end of w.
        high: Upper end of w, in (0, 1).
        plain: Share of rows on which the source does not act, in [0, 1).

    Raises:
        UserError: A number out of its range.
    """

    def __init__(self, low: float, high: float, plain: float) -> None:
        self.low, self.high, self.plain = low, high, require("plain", plain, "[0, 1)")

    @abc.abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """W at ``u`` in [0, 1]: the inverse of its cumulative distribution; same shape."""

    @abc.abstractmethod
    def describe(self) -> str:
        """One or two words and the range."""

    def __str__(self) -> str:
        return self.describe()


class UniformScale(Drawn):
    """W is uniform in [low, high].

    Args:
        low: Lower end, in [0, high].
        high: Upper end, in (0, 1).
        plain: Share of rows on which the source does not act, in [0, 1).

    Raises:
        UserError: A number out of its range.
    """

    def __init__(self, low: float = 0.0, high: float = 0.75, plain: float = 0.1) -> None:
        super().__init__(low, require("high", high, "(0, 1)"), plain)
        if not 0 <= low <= high:
            raise UserError(f"low={low}: must be in [0, high={high}]")
        if low > 0 and plain == 0:
            warnings.warn(
                f"low={low}, plain={plain}: scale 0 is never trained so, and unguided sampling, "
                "frozen copies and weak passes see it",
                stacklevel=2,
            )

    def quantile(self, u: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * u

    def describe(self) -> str:
        return f"uniform in [{self.low:g}, {self.high:g}]"


class OmegaPower(Drawn):
    """The guidance omega has a density proportional to omega^-power on [1, omega_max].

    Args:
        omega_max: Strongest guidance, in (1, 1000]; w is at most 1 - 1 / omega_max.
        power: 0 is uniform in omega, 1 uniform in its logarithm, 2 uniform in w.
        plain: Share of rows on which the source does not act, in [0, 1).

    Raises:
        UserError: A number out of its range.
    """

    def __init__(self, omega_max: float = 4.0, power: float = 1.0, plain: float = 0.1) -> None:
        require("omega_max", omega_max, "(1, 1000]")
        super().__init__(0.0, 1 - 1 / omega_max, plain)
        self.omega_max, self.power = omega_max, require("power", power, "[0, inf)")

    def omega(self, u: Tensor) -> Tensor:
        """The guidance at ``u`` in [0, 1]; same shape."""
        rest, largest = 1 - self.power, math.log(self.omega_max)
        if rest == 0:
            return (u * largest).exp()
        return ((u * math.expm1(rest * largest)).log1p() / rest).exp()

    def quantile(self, u: Tensor) -> Tensor:
        return (1 - 1 / self.omega(u)).clamp(0, self.high)

    def describe(self) -> str:
        return f"omega^-{self.power:g} in [1, {self.omega_max:g}]"


class IMeanFlow(OmegaPower):
    """The law of iMeanFlow (Geng et al., 2025), in the names of its code.

    Its intervals of time per row are not drawn: it tells them to a network that averages over time,
    and a velocity at one t needs them no more than the scale 0 outside.

    Args:
        s_max: omega reaches from 1 to 1 + s_max.
        cfg_beta: Exponent of its density.
        plain: Share of rows on which the source does not act, in [0, 1).

    Raises:
        UserError: A number out of its range.
    """

    def __init__(self, s_max: float = 7.0, cfg_beta: float = 1.0, plain: float = 0.0) -> None:
        require("s_max", s_max, "(0, 999]")
        super().__init__(1 + s_max, require("cfg_beta", cfg_beta, "[0, inf)"), plain)


def check_fits(name: str | None, omega: float, from_average: bool) -> None:
    """Refuse what a segment with a drawn scale cannot have.

    Raises:
        UserError: No name, a weight of v, or differences of the running average.
    """
    for key, value, good, rule in (
        ("name", name, name is not None, "given"),
        ("omega", omega, omega == 1, "1"),
        ("from_average", from_average, not from_average, "false"),
    ):
        if not good:
            raise UserError(f"{key}={value}: must be {rule} where the scale is drawn")
