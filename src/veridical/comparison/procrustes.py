"""What is left of the change once one stream may be rotated onto the other: the Procrustes distance.

With both streams centred and scaled to norm 1, the distance is min over orthogonal R of |X R - Y|_F^2 =
2 - 2 |X'Y|_* (Schonemann 1966; Ding, Denain and Steinhardt 2021, arXiv:2108.01661, who find it to answer to
changes that matter where CKA does not). Beside it stands the same distance without a rotation. It comes from
the products that CKA keeps, so it costs one singular value decomposition per site. With fewer than some ten
tokens for each dimension a rotation also fits noise, and the distance is too small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd
import torch

from veridical.comparison import influence

if TYPE_CHECKING:
    from veridical.comparison.cka import Products
    from veridical.comparison.influence import Kept


def procrustes(products: Products) -> tuple[float, float]:
    """The distance after the best rotation and without one, each in [0, 2] (the second up to 4).

    NaN where one of the two does not vary, and for the second where widths differ.
    """
    if not products.count:
        return float("nan"), float("nan")
    cross, ours, theirs = products.centred()
    scale = (ours * theirs) ** 0.5
    if not scale > 0:
        return float("nan"), float("nan")
    nuclear = float(torch.linalg.svdvals(cross).sum())
    straight = float(cross.trace()) if cross.shape[0] == cross.shape[1] else float("nan")
    # A NaN stays one.
    return 2 - 2 * min(1.0, nuclear / scale), 2 - 2 * straight / scale


def procrustes_frame(
    sites: Sequence[str], products: Sequence[Products], kept: Kept | None = None
) -> pd.DataFrame:
    """One line per site: `distance` after the best rotation with `low` and `high` (95 %, from the influence
    of `kept` pairs; NaN without), `unrotated`, and `tokens_per_dimension`."""
    lines = []
    for site, each in zip(sites, products):
        distance, unrotated = procrustes(each)
        low, high = influence.interval(
            distance, influence.of_procrustes, each, kept, site, lowest=0.0, highest=2.0
        )
        lines.append((site, distance, low, high, unrotated, each.count / max(1, each.cross.shape[0])))
    return pd.DataFrame(
        lines, columns=["site", "distance", "low", "high", "unrotated", "tokens_per_dimension"]
    )
