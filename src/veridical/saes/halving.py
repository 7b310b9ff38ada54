"""Successive halving keyed by tokens: who goes on at a rung, and why.

Members are judged where they can be compared: against peers of one architecture, width, sites, length and k
(or penalty), at the same number of tokens seen, on held-out vectors. At a rung the best 1/eta of all
peers that have come that far go on. Those that arrive together are judged together: on one machine all peers
do (successive halving, Jamieson and Talwalkar 2016, arXiv 1502.07943). On a cluster one that arrives later is
judged against all before it, the cancelled ones too (the stopping form of ASHA, Li et al. 2020, arXiv
1810.05934). The best of the peers at a rung is never cancelled there, in whatever order they arrive.

With a fixed k, L0 is matched by construction and explained variance ranks. Under a penalty L0 comes out as
it will, so a member is measured by how much less it explains than the best peer of no more than its L0 (and
a tenth): those that nobody beats so are the frontier and all go on, since which point of it is wanted is not
for the sweep to say. Members of another penalty are no peers: at the early rungs their L0 is not yet apart,
and the milder one would go for a difference that is noise. Losses are never compared.

What early figures cannot tell: a slow member that would have won in the end is lost. One control, cancelled
by nothing but NaN, shows what the rule would have thrown away; once it was spared it competes no more.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from veridical.errors import ConfigError, unknown
from veridical.saes.config import PENALISED, SAEConfig

MATCHED = 1.1
"""Factor within which two L0 count as matched on the frontier."""


@dataclass(frozen=True)
class Rules:
    """How a sweep is judged; see `SweepConfig` for the meaning of each."""

    eta: float
    rungs: int
    first: int | None
    grace: float
    max_dead: float


@dataclass(frozen=True)
class Entrant:
    """A member as the rule sees it.

    Attributes:
        name: Its name in the sweep.
        config: Its config.
        peers: In words, whom it is compared with; equal for members that are peers.
        tokens: Tokens of its whole training.
    """

    name: str
    config: SAEConfig
    peers: str
    tokens: int


@dataclass(frozen=True)
class Judgement:
    """What was found of a member at a rung.

    Attributes:
        name: The member.
        peers: Whom it was compared with.
        rung: Number of the rung, from 0.
        tokens: Tokens it had seen.
        explained_variance: On held-out vectors.
        l0: Active latents a token.
        dead: Share of its latents that fired for no held-out vector.
        behind: How much less it explained than the best peer at matched L0; 0 for the best.
        rank: Its place among the peers that had come to the rung, from 1.
        of: How many those were.
        kept: Whether it went on.
        spared: Whether it went on only because it is the control.
        reason: Why, in a sentence.
    """

    name: str
    peers: str
    rung: int
    tokens: int
    explained_variance: float
    l0: float
    dead: float
    behind: float
    rank: int
    of: int
    kept: bool
    spared: bool
    reason: str


@dataclass(frozen=True)
class Arrival:
    """A member at a rung: tokens it has seen, and its figures there, which are finite."""

    name: str
    tokens: int
    explained_variance: float
    l0: float
    dead: float


def peers_of(config: SAEConfig, sites: Sequence[str], d_in: int, tokens: int) -> str:
    """Whom a member is compared with, in words that are the same for all of them."""
    said = f"{config.architecture} of {config.latents(d_in):,} latents"
    said += f", penalty {config.penalty:g}" if config.architecture in PENALISED else f", k {config.k}"
    if config.prefixes:
        said += f", prefixes {'/'.join(map(str, config.prefixes))}"
    if config.skip:
        said += ", with skip"
    return f"{said}, at {' and '.join(sites)}, over {tokens:,} tokens"


def rungs_of(peers: Sequence[Entrant], rules: Rules) -> tuple[int, ...]:
    """Tokens at which these peers are judged, rising.

    The last is 1/eta of the training, each before it 1/eta of the next (or the first is given, and each is
    eta times the one before). None is earlier than a grace period after the latest warm-up among the peers.

    Raises:
        ConfigError: Warm-up and grace leave nothing of the training.
    """
    tokens = peers[0].tokens
    if rules.first is None:
        wanted = [tokens / rules.eta ** (rules.rungs - number) for number in range(rules.rungs)]
    else:
        wanted = [rules.first * rules.eta**number for number in range(rules.rungs)]
    warm = max(max(one.config.warmup, one.config.sparsity_warmup) for one in peers)
    earliest = (warm + rules.grace) * tokens
    if earliest >= tokens and len(peers) > 1:
        raise ConfigError(
            f"warm-up ({warm:g}) and grace ({rules.grace:g}) take the whole training of {peers[0].name}: "
            "nothing could be judged; expected shares that add up to less than 1"
        )
    found = {math.ceil(max(rung, earliest)) for rung in wanted}
    return tuple(sorted(rung for rung in found if rung < tokens))


class Halving:
    """The judge of a sweep.

    Args:
        entrants: All members, also those that have not begun.
        rules: How to judge.
        control: Name of the member that is never cancelled; the first when not given.

    Attributes:
        judgements: What was decided so far, in order.

    Raises:
        UnknownNameError: No member has the control's name.
        ConfigError: Nothing could be judged.
    """

    def __init__(self, entrants: Sequence[Entrant], rules: Rules, control: str | None = None) -> None:
        self.rules = rules
        self._entrants = {one.name: one for one in entrants}
        if control is not None and control not in self._entrants:
            raise unknown("control", control, self._entrants)
        self.control = entrants[0].name if control is None else control
        self.judgements: list[Judgement] = []
        by_peers: dict[str, list[Entrant]] = {}
        for one in entrants:
            by_peers.setdefault(one.peers, []).append(one)
        self._rungs = {
            peers: rungs_of(some, rules) if len(some) > 1 else () for peers, some in by_peers.items()
        }

    def rungs(self, name: str) -> tuple[int, ...]:
        """Tokens at which a member is judged; none for one without peers."""
        return self._rungs[self._entrants[name].peers]

    def due(self, name: str, seen: int) -> bool:
        """Whether a member that has seen so many tokens stands at a rung it was not judged at."""
        rungs, judged = self.rungs(name), len(self.of(name))
        return judged < len(rungs) and seen >= rungs[judged]

    def of(self, name: str) -> list[Judgement]:
        """A member's judgements in order of rungs."""
        return [one for one in self.judgements if one.name == name]

    def judge(self, arrivals: Sequence[Arrival]) -> list[Judgement]:
        """Decides about members that are due, together where they are peers at one rung."""
        by_place: dict[tuple[str, int], list[Arrival]] = {}
        for one in arrivals:
            place = self._entrants[one.name].peers, len(self.of(one.name))
            by_place.setdefault(place, []).append(one)
        made = [
            found for (peers, rung), some in by_place.items() for found in self._at_rung(peers, rung, some)
        ]
        self.judgements += made
        return made

    def state(self) -> list[dict[str, Any]]:
        """The judgements as plain JSON values."""
        return [asdict(one) for one in self.judgements]

    def restore(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Takes up what `state` gave."""
        self.judgements = [Judgement(**one) for one in state]

    def _at_rung(self, peers: str, rung: int, arrivals: list[Arrival]) -> list[Judgement]:
        field: list[Arrival | Judgement] = list(self._field(peers, rung))
        field += [one for one in arrivals if not self._beside(one.name, rung)]
        made = []
        for one in arrivals:
            rank, of, behind, wrong = self._places(field if one in field else [*field, one])[one.name]
            spared = wrong is not None and one.name == self.control
            reason = wrong or _place(one, rank, of)
            made.append(
                Judgement(
                    **asdict(one),
                    peers=peers,
                    rung=rung,
                    behind=behind,
                    rank=rank,
                    of=of,
                    kept=wrong is None or spared,
                    spared=spared,
                    reason=f"control, which is never cancelled; {reason}" if spared else reason,
                )
            )
        return made

    def _field(self, peers: str, rung: int) -> list[Judgement]:
        """Who competes at a rung, of those that were judged there."""
        found = [one for one in self.judgements if (one.peers, one.rung) == (peers, rung)]
        return [one for one in found if not self._beside(one.name, rung)]

    def _beside(self, name: str, rung: int) -> bool:
        """Whether a member is a control that was spared at an earlier rung: it is out, and takes no place."""
        return name == self.control and any(one.spared and one.rung < rung for one in self.of(name))

    def _places(self, field: Sequence[Arrival | Judgement]) -> dict[str, tuple[int, int, float, str | None]]:
        """By name: rank, of how many, how far behind, and why it goes no further, if it does not."""
        penalised = self._entrants[field[0].name].config.architecture in PENALISED
        behind = {one.name: _behind(one, field, penalised) for one in field}
        failed = self._failed(field, penalised)
        order = sorted(field, key=lambda one: (one.name in failed, behind[one.name], -one.explained_variance))
        going = math.ceil(len(field) / self.rules.eta)
        found = {}
        for rank, one in enumerate(order, 1):
            wrong = failed.get(one.name)
            if wrong is None and rank > going and not (penalised and behind[one.name] == 0):
                wrong = (
                    f"{_place(one, rank, len(field))}, of which {going} go on: it explains "
                    f"{one.explained_variance:.3f} of the variance at L0 {one.l0:.3g}, "
                    f"{behind[one.name]:.3f} less than the best at matched L0 "
                    f"({self._entrants[one.name].peers})"
                )
            found[one.name] = rank, len(field), behind[one.name], wrong
        return found

    def _failed(self, field: Sequence[Arrival | Judgement], penalised: bool) -> dict[str, str]:
        """Members that go no further whatever their rank, with the reason: much deader than their peers, or
        collapsed to explaining nothing where L0 is free (which the frontier's sparse end would protect)."""
        found = {}
        typical = statistics.median(one.dead for one in field)
        most = self.rules.max_dead
        alive = any(one.explained_variance > 0 for one in field)
        for one in field:
            if one.dead > most >= typical:
                found[one.name] = (
                    f"{one.dead:.0%} of its latents are dead after {one.tokens:,} tokens (more than "
                    f"{most:.0%}; median of its peers: {typical:.0%})"
                )
            elif penalised and alive and one.explained_variance <= 0:
                found[one.name] = (
                    f"it explains nothing after {one.tokens:,} tokens (L0 {one.l0:.3g}), and others do"
                )
        return found


def _behind(one: Arrival | Judgement, field: Sequence[Arrival | Judgement], penalised: bool) -> float:
    """How much less of the variance a member explains than the best at matched L0."""
    matched = [other for other in field if not penalised or other.l0 <= MATCHED * one.l0]
    return max(0.0, max(other.explained_variance for other in matched) - one.explained_variance)


def _place(one: Arrival | Judgement, rank: int, of: int) -> str:
    return f"rank {rank} of {of} after {one.tokens:,} tokens"
