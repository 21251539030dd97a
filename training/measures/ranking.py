"""Whether a measure ranks networks as their generalization gap does: Kendall's tau, and granulated Psi.

    tau_b = (concordant - discordant) / sqrt((pairs - ties in x) (pairs - ties in y))

Psi (Jiang et al., "Fantastic Generalization Measures and Where to Find Them", ICLR 2020, equation 3) looks at one
setting at a time: the mean tau_b of groups of networks that differ in it alone, then the mean over settings. A measure
that follows nothing but the width has a high tau in a pool of many widths, not a high Psi.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qdeploy.checks import shape_text
from qdeploy.errors import InputError

Network = Mapping[str, Any]  # its settings, measures and gap by name


def kendall_tau_b(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """Of two of [n]; NaN where one of them has only one value, n below 2 included.

    Raises InputError for others than two vectors of one length without NaN.
    """
    first, second = np.asarray(x, float), np.asarray(y, float)
    if first.ndim != 1 or first.shape != second.shape:
        got = f"{shape_text(first.shape)} and {shape_text(second.shape)}"
        raise InputError(f"expected two vectors of one length, got {got} - at kendall_tau_b")
    if np.isnan(first).any() or np.isnan(second).any():
        raise InputError("expected numbers, got NaN - at kendall_tau_b")
    up, right = (np.sign(one[:, None] - one) for one in (first, second))  # every pair twice, in both orders
    pairs = (up**2).sum() * (right**2).sum()
    return float((up * right).sum() / math.sqrt(pairs)) if pairs else math.nan


def ranking(
    networks: Sequence[Network],
    measures: Sequence[str],
    settings: Sequence[str],
    gap: str = "gap",
    beside: Sequence[str] = (),
) -> dict[str, Any]:
    """How each of `measures` ranks `networks` against `gap`. Groups differ in one of `settings` alone; they share what
    `beside` names as well, such as the seed, by which nobody chooses a network.

    A network without a measure (None: a saturated search, say) is left out of that measure. Groups in which measure or
    gap is the same for all have no tau and do not count.

    Returns {"table": rows of "measure", "networks" (how many count), "left_out", "tau" and "psi"; "granulated": rows of
    "measure", "setting", "groups" and "tau", their mean}; None where there is none. Raises InputError for a network
    that lacks a setting, or the gap.
    """
    table, granulated = [], []
    for network in networks:
        for name in (*settings, *beside, gap):
            if network.get(name) is None:
                raise InputError(f"expected `{name}` of every network, got none - at {dict(network)}")
    for measure in measures:
        known = [network for network in networks if network.get(measure) is not None]
        means = []
        for setting in settings:
            groups = _groups(known, setting, [*settings, *beside])
            taus = [tau for group in groups if (tau := _tau(group, measure, gap)) is not None]
            mean = statistics.fmean(taus) if taus else None
            granulated.append({"measure": measure, "setting": setting, "groups": len(taus), "tau": mean})
            means += [] if mean is None else [mean]
        row = {"measure": measure, "networks": len(known), "left_out": len(networks) - len(known)}
        table.append({**row, "tau": _tau(known, measure, gap), "psi": statistics.fmean(means) if means else None})
    return {"table": table, "granulated": granulated}


def _groups(networks: Sequence[Network], setting: str, settings: Sequence[str]) -> list[list[Network]]:
    """Networks that share all settings but one."""
    groups: dict[tuple, list[Network]] = {}
    for network in networks:
        groups.setdefault(tuple(network[name] for name in settings if name != setting), []).append(network)
    return [*groups.values()]


def _tau(networks: Sequence[Network], measure: str, gap: str) -> float | None:
    tau = kendall_tau_b([one[measure] for one in networks], [one[gap] for one in networks])
    return None if math.isnan(tau) else tau
