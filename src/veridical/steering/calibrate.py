"""The strength at which an intervention costs a given KL on neutral text."""

from __future__ import annotations

import math
from collections.abc import Callable

from veridical.errors import InputError, NonFiniteError

Curve = list[tuple[float, float]]
"""Strengths and the KL measured at each, nats a token."""
TRIES = 30
LARGEST = 1e6


def strength_for(
    measure: Callable[[float], float], target: float, *, start: float = 1.0, tolerance: float = 0.02
) -> tuple[float, Curve]:
    """The least strength found whose KL is the target, within a share `tolerance`, and all that was measured.

    KL grows with the square of a small strength, which gives the steps; what is found lies between a strength
    that was measured below the target and one that was measured above it.

    Args:
        measure: From a strength to its KL.
        target: KL, nats a token.
        start: First strength tried.
        tolerance: Relative error of the KL.

    Raises:
        InputError: A target that is not above 0, one that no strength reaches, or an intervention that does
            nothing on the neutral text.
    """
    if not (math.isfinite(target) and target > 0):
        raise InputError(f"target_kl is {target!r}; expected nats a token above 0")
    curve: Curve = []
    low, high = (0.0, 0.0), None
    strength = start
    for _ in range(TRIES):
        kl = _measured(measure, strength)
        curve.append((strength, kl))
        if abs(kl / target - 1) <= tolerance:
            return strength, curve
        if kl < target:
            low = (strength, kl)
        else:
            high = (strength, kl)
        if high is None and (strength >= LARGEST or _flat(curve)):
            break
        strength = _next(low, high, target)
    if high is None:
        most = max(kl for _, kl in curve)
        if most == 0:
            raise InputError(
                "the intervention does nothing on the neutral text, so that KL sets it no strength"
            )
        raise InputError(
            f"no strength gives a KL of {target:g} nats a token on the neutral text: at "
            f"{curve[-1][0]:g} it is {most:.3g}"
        )
    if low[0] == 0:
        raise InputError(
            f"even a strength of {high[0]:.3g} costs {high[1]:.3g} nats a token, over {target:g}"
        )
    return low[0], curve


def _measured(measure: Callable[[float], float], strength: float) -> float:
    try:
        return measure(strength)
    except NonFiniteError:
        return math.inf


def _flat(curve: Curve) -> bool:
    """Whether the last three steps up changed nothing."""
    last = [kl for _, kl in curve[-4:]]
    return len(last) == 4 and max(last) - min(last) <= 1e-3 * max(last)


def _next(low: tuple[float, float], high: tuple[float, float] | None, target: float) -> float:
    """The strength to try between `low` and `high`, or beyond `low`."""
    if high is None:
        strength, kl = low
        factor = math.sqrt(target / kl) * 1.05 if kl > 0 else 8.0
        return strength * min(8.0, max(1.2, factor))
    if low[0] == 0:
        strength, kl = high
        return strength * min(0.8, max(0.05, math.sqrt(target / kl)))
    (a, kl_a), (b, kl_b) = low, high
    if not math.isfinite(kl_b) or kl_a <= 0 or kl_b <= kl_a:
        share = 0.5
    else:
        share = math.log(target / kl_a) / math.log(kl_b / kl_a)
    return a * (b / a) ** min(0.9, max(0.1, share))
