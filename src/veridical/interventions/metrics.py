"""What an intervention is judged by: a number for each row of a batch, from the logits at its last positions.

Text inputs of this package are padded on the left, so the last position of every row is its last token and
the named metrics read only that one (`keep` = 1). A function of your own takes the logits
`[batch, kept, vocabulary]` (of a classifier `[batch, label]`) and returns `[batch]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from veridical.errors import InputError, unknown

if TYPE_CHECKING:
    from veridical.hooked import HookedModel
    from veridical.interventions.inputs import Inputs

Answers = str | int | Sequence[Any] | Tensor
"""A text or token id for all rows, or one for each row; several ids for a row as a list of their own."""


@dataclass(frozen=True)
class Metric:
    """A number for each row.

    Attributes:
        name: What it is called.
        function: From logits `[batch, kept, vocabulary]` to `[batch]`; of a metric with a `site`, from the
            activation `[batch, d]` at the last token there.
        keep: How many last positions' logits it reads; None for all.
        unit: What it is counted in.
        site: Where it reads an activation instead of logits; canonical name.
        differentiable: Whether its gradient means something.
        targets: Rows' own data, made into the function by `bind`; None for a function that sees all rows.
        bind: Makes the function for the targets of some rows.
    """

    name: str
    function: Callable[[Tensor], Tensor] | None
    keep: int | None = 1
    unit: str = ""
    site: str | None = None
    differentiable: bool = True
    targets: dict[str, Tensor] | None = None
    bind: Callable[[dict[str, Tensor]], Callable[[Tensor], Tensor]] | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """The metric of each row, `[batch]`, float32 or float64.

        Raises:
            InputError: Not a tensor, another shape than `[batch]`, or answers for another number of rows.
        """
        if self.function is None:
            raise InputError(
                f"{self.name} compares with a reference run; give it with with_reference(logits)"
            )
        x = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        found = self.function(x)
        if not isinstance(found, Tensor):
            raise InputError(
                f"the metric {self.name} returned a {type(found).__name__}; expected a tensor [batch], "
                f"here [{len(x)}]"
            )
        if found.shape != x.shape[:1]:
            shape = "a scalar" if found.dim() == 0 else f"shape {list(found.shape)}"
            raise InputError(
                f"the metric {self.name} returned {shape}; expected one number for each row, "
                f"[batch] = [{len(x)}] (do not average over the batch)"
            )
        return found if found.dtype in (torch.float32, torch.float64) else found.float()

    @property
    def ids(self) -> Tensor | None:
        """`[n]`, the vocabulary's ids whose logits it reads; None where it reads all, or cannot tell."""
        if self.bind is not _logit_diff or self.targets is None:
            return None
        found = torch.cat([table.flatten() for table in self.targets.values()]).unique()
        return found[found >= 0]

    def with_reference(self, logits: Tensor) -> Metric:
        """This metric with the run that it compares with, `[batch, kept, vocabulary]`; others unchanged."""
        if self.name != "kl":
            return self
        x = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        return _bound(self, {"reference": _last(x.detach()).log_softmax(-1)})

    def take(self, rows: Tensor | Sequence[int], total: int) -> Metric:
        """The metric for a batch whose row i is example `rows[i]` of `total`.

        Raises:
            InputError: A function of your own, which sees every example, and rows that are not whole copies
                of all of them.
        """
        index = torch.as_tensor(rows)
        if self.site is not None:
            return self
        if self.targets is not None:
            self.check(total)
            chosen = {
                name: values if len(values) == 1 else values[index.to(values.device)]
                for name, values in self.targets.items()
            }
            return _bound(self, chosen)
        if self.function is None:
            return self
        whole = torch.arange(total).repeat(max(1, len(index) // total))
        if not torch.equal(index.cpu(), whole):
            raise InputError(f"the metric {self.name} is a function that sees all {total} examples at once")
        return replace(self, function=lambda x: torch.cat([self(part) for part in x.split(total)]))

    def check(self, rows: int) -> None:
        """Refuses answers for another number of rows.

        Raises:
            InputError: Neither one answer for all rows nor one for each.
        """
        for name, values in (self.targets or {}).items():
            if len(values) not in (1, rows):
                raise InputError(
                    f"{len(values)} {name} for {rows} rows; give one for all rows or one for each"
                )


class ProbeMetric(Metric):
    """A probe's decision value at its own site, read at the last token of each row."""

    def __init__(self, probe: Any, site: str | None = None) -> None:
        """
        Args:
            probe: A fitted linear probe (`LogisticProbe`, a loaded one, ...).
            site: Where it reads; the probe's own site when not given.
        """
        place = site or getattr(probe, "site", None)
        if place is None:
            raise InputError("this probe does not say which site it reads; give ProbeMetric(probe, site)")
        weights = torch.as_tensor(np.asarray(probe.coef_, dtype=np.float64))
        offset = torch.as_tensor(np.asarray(probe.intercept_, dtype=np.float64))
        if len(weights) != 1:
            raise InputError(f"this probe has {len(weights)} decision values for each row; expected one")

        def score(x: Tensor) -> Tensor:
            if x.shape[-1] != weights.shape[1]:
                raise InputError(f"the probe reads {weights.shape[1]} dimensions; {x.shape[-1]} arrived")
            return x @ weights[0].to(x) + offset.reshape(-1)[0].to(x)

        super().__init__("probe", score, 1, "decision value", site=str(place))


def as_metric(
    spec: str | Callable[[Tensor], Tensor] | Metric,
    model: HookedModel,
    answers: Answers | None = None,
    wrong: Answers | None = None,
    reference: Tensor | None = None,
    keep: int | None = None,
    inputs: Inputs | None = None,
) -> Metric:
    """The metric that `spec` means.

    Args:
        spec: A `Metric`, a function `logits -> [batch]`, a fitted probe, or a name: "logit_diff" (answers
            minus wrong), "prob", "logprob", "cross_entropy" (of the answers as the next token), "kl" (of the
            whole next-token distribution from the reference's, in nats), "rank" (of the answer; 0 is top).
            Of several answers of a row the mean is taken.
        model: For its tokenizer and sites.
        answers: The right answer: a text, an id, or one for each row (several ids as a list). Of a text, the
            first token as a continuation.
        wrong: The same for the wrong answer.
        reference: For "kl", logits `[batch, kept, vocabulary]`; the tools fill in the clean run's.
        keep: For a function: how many last positions it reads; all when not given.
        inputs: The runs that it will judge: their own answers stand in where none are given, and texts are
            tokenised behind their prompts.

    Raises:
        UnknownNameError: A name that is none of these.
        InputError: Answers that are missing, do not fit, or begin with the same token as the wrong ones.
    """
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise InputError(f"keep is {keep!r}; expected the number of last positions that the metric reads")
    if isinstance(spec, Metric):
        return _placed(spec, model)
    if hasattr(spec, "coef_") and hasattr(spec, "decision_function"):
        return _placed(ProbeMetric(spec), model)
    if not isinstance(spec, str):
        if not callable(spec):
            raise InputError(
                f"metric is a {type(spec).__name__}; expected a name or a function of the logits"
            )
        return Metric(str(getattr(spec, "__name__", "metric")), spec, keep)
    if spec == "probe":
        raise InputError("metric 'probe' needs the probe itself; give metric=ProbeMetric(probe, site)")
    if spec not in _NAMED:
        raise unknown("metric", spec, [*_NAMED, "probe"], "Or give a function logits -> [batch].")
    if keep not in (None, 1):
        raise InputError(f"metric {spec!r} reads the last position only; keep={keep} is for a function")
    bind, unit, wants = _NAMED[spec]
    named = Metric(spec, None, 1, unit, differentiable=spec != "rank", bind=bind)
    if spec == "kl":
        return named if reference is None else named.with_reference(reference)
    if inputs is not None and answers is None:
        answers = inputs.answers
    if inputs is not None and wrong is None:
        wrong = inputs.wrong
    ids = {"answers": _ids("answers", answers, spec, model, inputs)}
    if "wrong" in wants:
        ids["wrong"] = _ids("wrong", wrong, spec, model, inputs)
        _check_apart(ids["answers"], ids["wrong"], model)
    return _bound(named, {name: _table(rows, model) for name, rows in ids.items()})


def _bound(metric: Metric, targets: dict[str, Tensor]) -> Metric:
    assert metric.bind is not None
    inner = metric.bind(targets)

    def function(logits: Tensor) -> Tensor:
        bound.check(len(logits))
        return inner(logits)

    bound = replace(metric, function=function, targets=targets)
    return bound


def _placed(metric: Metric, model: HookedModel) -> Metric:
    if metric.site is None:
        return metric
    (site,) = model.resolve(metric.site)
    return _moved(metric, site.name)


def _moved(metric: Metric, site: str) -> Metric:
    return Metric(metric.name, metric.function, metric.keep, metric.unit, site, metric.differentiable)


# The named metrics. An answers' table holds ids, -1 where a row has fewer than others.


def _last(logits: Tensor) -> Tensor:
    return logits if logits.dim() == 2 else logits[:, -1]


def _mean_at(values: Tensor, ids: Tensor) -> Tensor:
    """Mean of `values` `[batch, vocabulary]` at each row's `ids` `[batch or 1, k]`."""
    ids = ids.to(values.device).expand(len(values), -1)
    real = ids >= 0
    chosen = values.gather(-1, ids.clamp(min=0)).masked_fill(~real, 0)
    return chosen.sum(-1) / real.sum(-1)


def _logit_diff(targets: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: _mean_at(_last(x), targets["answers"]) - _mean_at(_last(x), targets["wrong"])


def _prob(targets: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: _mean_at(_last(x).softmax(-1), targets["answers"])


def _logprob(targets: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: _mean_at(_last(x).log_softmax(-1), targets["answers"])


def _cross_entropy(targets: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: -_mean_at(_last(x).log_softmax(-1), targets["answers"])


def _kl(targets: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    def divergence(x: Tensor) -> Tensor:
        theirs, ours = targets["reference"].to(x), _last(x).log_softmax(-1)
        # Terms of probability 0 are 0, also where the run gives that token probability 0.
        terms = torch.where(theirs > -torch.inf, theirs.exp() * (theirs - ours), torch.zeros_like(ours))
        return terms.sum(-1)

    return divergence


def _rank(targets: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    def rank(x: Tensor) -> Tensor:
        x = _last(x)
        ids = targets["answers"].to(x.device).expand(len(x), -1)
        own = x.gather(-1, ids.clamp(min=0))
        above = (x[:, None, :] > own[..., None]).sum(-1).to(x)
        real = ids >= 0
        return above.masked_fill(~real, 0).sum(-1) / real.sum(-1)

    return rank


_NAMED: dict[str, tuple[Callable, str, tuple[str, ...]]] = {
    "logit_diff": (_logit_diff, "logits", ("answers", "wrong")),
    "prob": (_prob, "probability", ("answers",)),
    "logprob": (_logprob, "nats", ("answers",)),
    "cross_entropy": (_cross_entropy, "nats", ("answers",)),
    "kl": (_kl, "nats", ()),
    "rank": (_rank, "tokens above", ("answers",)),
}


# Answers to token ids


def _ids(
    what: str, given: Answers | None, metric: str, model: HookedModel, inputs: Inputs | None
) -> list[list[int]]:
    if given is None:
        raise InputError(f"metric {metric!r} needs {what}=: a text or token id for all rows, or one for each")
    if isinstance(given, (Tensor, np.ndarray)):
        given = given.tolist()
    rows: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
    if not rows:
        raise InputError(f"{what} is empty; give a text or token id for all rows, or one for each")
    if inputs is not None and len(rows) not in (1, len(inputs)):
        raise InputError(f"{len(rows)} {what} for {len(inputs)} rows; give one for all rows or one for each")
    if inputs is not None and len(rows) == 1 and isinstance(rows[0], str):
        rows = rows * len(inputs)
    found = []
    for row, value in enumerate(rows):
        options = list(value) if isinstance(value, list | tuple) else [value]
        if not options:
            raise InputError(f"row {row} has no {what}")
        found.append([_one_id(option, what, model, inputs, row) for option in options])
    return found


def _one_id(value: Any, what: str, model: HookedModel, inputs: Inputs | None, row: int) -> int:
    if isinstance(value, str):
        return _first_token(value, what, model, inputs, row)
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InputError(f"{what} of row {row} is {value!r}; expected a text or a token id")
    vocabulary = model.architecture.vocabulary if model.kind != "vision" else 0
    if value < 0 or (vocabulary and value >= vocabulary):
        raise InputError(f"{what} of row {row} is token {value}; the vocabulary has 0 to {vocabulary - 1}")
    return int(value)


def _first_token(text: str, what: str, model: HookedModel, inputs: Inputs | None, row: int) -> int:
    if model.tokenizer is None:
        raise InputError(f"{what} of row {row} is the text {text!r}, and {model.path} has no tokenizer")
    prompt = inputs.prompts[row] if inputs is not None and inputs.prompts is not None else None
    closed = isinstance(prompt, list) and prompt[-1]["role"] == "assistant"
    if prompt is not None and not closed and model.kind == "causal":
        alone, joined = model.encode([prompt, prompt], [None, text])
        if joined.prompt_tokens < len(alone.ids):
            raise InputError(
                f"{what} of row {row}, {text!r}, shares a token with the end of its prompt; begin it with a "
                "space, or give a token id"
            )
        ids = list(joined.ids[joined.prompt_tokens :])
    else:
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError(f"{what} of row {row}, {text!r}, has no tokens")
    return int(ids[0])


def _check_apart(answers: list[list[int]], wrong: list[list[int]], model: HookedModel) -> None:
    count = max(len(answers), len(wrong))
    for row in range(count):
        ours = answers[row if len(answers) > 1 else 0]
        theirs = wrong[row if len(wrong) > 1 else 0] if row < len(wrong) or len(wrong) == 1 else []
        if shared := sorted(set(ours) & set(theirs)):
            text = f" ({model.tokenizer.decode([shared[0]])!r})" if model.tokenizer is not None else ""
            raise InputError(
                f"row {row}: the right and the wrong answer begin with the same token {shared[0]}{text}; "
                "compare answers that differ in their first token"
            )


def _table(rows: list[list[int]], model: HookedModel) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], device=model.device)
