"""Heads and neurons: which parts of a site's value an intervention acts on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veridical.errors import InputError
from veridical.sites import HEAD_KINDS, Site

if TYPE_CHECKING:
    from veridical.hooked import HookedModel


@dataclass(frozen=True, eq=False)
class Units:
    """Some of the heads or neurons of a value, or all of it.

    Attributes:
        axis: Axis of the value `[batch, pos, ...]` (of a pattern `[batch, head, query, key]`) that they lie
            on; None for the whole value.
        numbers: Which they are.
    """

    axis: int | None = None
    numbers: tuple[int, ...] = ()
    _held: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def read(self, value: Tensor) -> Tensor:
        """The chosen part: a view where the numbers follow each other, else a copy."""
        if self.axis is None:
            return value
        if self._run:
            return value.narrow(self.axis, self.numbers[0], len(self.numbers))
        return value.index_select(self.axis, self._index(value))

    def write(self, value: Tensor, new: Tensor) -> Tensor:
        """`value`, changed in place, with the chosen part set to what `new` broadcasts to."""
        if self.axis is None or self._run:
            self.read(value).copy_(new)
            return value
        shape = list(value.shape)
        shape[self.axis] = len(self.numbers)
        return value.index_copy_(self.axis, self._index(value), new.expand(shape))

    @property
    def _run(self) -> bool:
        return self.numbers == tuple(range(self.numbers[0], self.numbers[0] + len(self.numbers)))

    def _index(self, value: Tensor) -> Tensor:
        if value.device not in self._held:
            self._held[value.device] = torch.tensor(self.numbers, device=value.device)
        return self._held[value.device]


def units_of(model: HookedModel, site: Site, heads: Any, neurons: Any) -> Units:
    """The chosen heads or neurons at a site; all of it when neither is given.

    Raises:
        InputError: A head or neuron that is not there (with grouped queries, the groups are named), heads at
            a site that has none, or both kinds at once.
    """
    if heads is not None and neurons is not None:
        raise InputError("heads and neurons were both given; a site has one or the other")
    if heads is not None:
        return Units(1 if site.kind == "pattern" else 2, _heads(model, site, heads))
    if neurons is not None:
        return Units(2, _neurons(model, site, neurons))
    return Units()


def per_site(model: HookedModel, sites: list[Site], given: Any, what: str) -> dict[Site, Any]:
    """`given` for each site: the same for all, or by a mapping from sites to what is meant there."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(sites, given)
    found = {site: value for spec, value in given.items() for site in model.resolve(spec)}
    for site in found:
        if site not in sites:
            raise InputError(f"{what} names {site.short}, which is not among the sites")
    for site in sites:
        if site not in found:
            raise InputError(f"{what} says nothing of {site.short}")
    return found


def head_count(model: HookedModel, site: Site) -> int:
    """Heads at a site; at k and v, key/value heads.

    Raises:
        InputError: A site that is not per head.
    """
    if site.kind == "pattern":
        return model.n_heads
    if site.kind not in HEAD_KINDS:
        raise InputError(
            f"{site.short} is not per head; heads are at sites of kind {', '.join(HEAD_KINDS)} and pattern "
            "(z is what each head writes)"
        )
    return int(model.width(site)[0])


def _heads(model: HookedModel, site: Site, given: Any) -> tuple[int, ...]:
    count = head_count(model, site)
    numbers = _integers(given, "heads")
    for number in numbers:
        if 0 <= number < count:
            continue
        if count < model.n_heads:
            size = model.n_heads // count
            groups = ", ".join(f"{k}: {k * size}-{k * size + size - 1}" for k in range(count))
            raise InputError(
                f"head {number} at {site.short}: there are {count} key/value heads, each shared by a group "
                f"of query heads ({groups})"
            )
        raise InputError(f"head {number} at {site.short}: {model.path} has heads 0 to {count - 1} there")
    return numbers


def _neurons(model: HookedModel, site: Site, given: Any) -> tuple[int, ...]:
    width = () if site.kind == "pattern" else model.width(site)
    if len(width) != 1:
        raise InputError(f"{site.short} is per head; neurons are at mlp_post.{site.layer or 0}")
    numbers = _integers(given, "neurons")
    for number in numbers:
        if not 0 <= number < width[0]:
            raise InputError(
                f"neuron {number} at {site.short}: {model.path} has neurons 0 to {width[0] - 1} there"
            )
    return numbers


def _integers(given: Any, what: str) -> tuple[int, ...]:
    listed = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if not listed or not all(hasattr(one, "__index__") and not isinstance(one, bool) for one in listed):
        raise InputError(f"{what} is {given!r}; expected an integer or several")
    return tuple(sorted({int(one) for one in listed}))
