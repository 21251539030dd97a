"""f32 arithmetic by integers alone, one correctly rounded operation at a time: what numpy is compared with."""

from __future__ import annotations

import math
from fractions import Fraction


def round_to_f32(exact: Fraction) -> float:
    """The f32 nearest to an exact number, half to even, by integer arithmetic alone."""
    if exact == 0:
        return 0.0
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    exponent -= abs(exact) < Fraction(2) ** exponent
    quantum = Fraction(2) ** max(exponent - 23, -149)
    rounded = round(exact / quantum) * quantum
    return math.copysign(math.inf, exact) if abs(rounded) >= 2**128 else float(rounded)


def exact_fma(a: float, b: float, c: float) -> float:
    return round_to_f32(Fraction(a) * Fraction(b) + Fraction(c))


def exact_sqrt(x: float) -> float:
    """Of a positive f32. A digit behind 30 exact ones says whether there is more, and no tie can occur."""
    root = math.isqrt(int(Fraction(x) * 4**180))
    more = root * root != Fraction(x) * 4**180
    return round_to_f32(Fraction(2 * root + more, 2 * 2**180))


def code(r: float, low: int, high: int) -> int:
    """clamp(rint(r), low, high)."""
    return min(max(round(Fraction(r)), low), high)
