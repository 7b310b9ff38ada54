"""Direct logit attribution: what each part of a model adds to a logit, or to the difference of two.

The residual stream at the last token is a sum: what enters the first block, each head's values through its
slice of the output projection, the biases, and each MLP. The final norm is linear in that sum once its scale
is held at the value that it has in this run, and so is the unembedding. So the logit is split exactly (as in
Elhage et al. 2021, "A mathematical framework for transformer circuits"; nostalgebraist 2020):

    logit = sum over parts of  W_U[answer] . (gain * scale * (part - its mean, for a LayerNorm))  +  constant

with `constant` what the norm's and the unembedding's biases add. It is the direct path only: what a part does
through later layers is not in it. Holding the scale still means that a part which lengthens the whole stream,
and so weakens all others, gets no blame for it. Where the model caps its logits (gemma2), it is the logit
before the cap that is split.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from veridical.errors import InputError, ModelError
from veridical.interventions.contributions import head_contributions, output_projection
from veridical.interventions.graph import Graph
from veridical.interventions.lenses import one_sided
from veridical.interventions.metrics import Answers, as_metric
from veridical.probes import evaluate
from veridical.saes.logit_effects import unembedding
from veridical.saved_result import Saved
from veridical.sites import Site

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from veridical.hooked import HookedModel
    from veridical.reporting.section import Section

RESAMPLES = 1000


@dataclass(frozen=True, repr=False)
class DirectLogits(Saved):
    """A logit, or the difference of two, as a sum over the parts of a model.

    Attributes:
        table: One line per part, in the order in which they write: `component` (`embed`, `positions`,
            `head.L.H` or `attn.L`, `attn_bias.L`, `mlp.L`, `constant`), `kind`, `layer`, `head`.
        values: `[parts, texts]`, what each adds, float64; a text's column sums to its total.
        totals: `[texts]`, the logit (difference) that the model gives, before a cap.
        groups: `[texts]`, pair of each text, for intervals.
        facts: Model, what was split, and seed.
    """

    table: pd.DataFrame
    values: np.ndarray
    totals: np.ndarray
    groups: np.ndarray
    facts: Mapping[str, Any]

    def to_frame(self) -> pd.DataFrame:
        """One line per part: what `table` has, `mean` over texts with its 95 % interval by pair (`low`,
        `high`; NaN with one text), and `share` of the mean total."""
        mean, total = self.values.mean(1), float(self.totals.mean())
        low = high = np.full(len(mean), np.nan)
        if len(np.unique(self.groups)) > 1:
            weights = evaluate.resample_weights(self.groups, RESAMPLES, int(self.facts["seed"])).astype(float)
            drawn = (weights @ self.values.T) / weights.sum(1, keepdims=True)
            low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
        share = mean / total if total else np.full(len(mean), np.nan)
        return self.table.assign(mean=mean, low=low, high=high, share=share)

    def findings(self) -> list[str]:
        """What the table says, in sentences."""
        frame = self.to_frame()
        means, parts = self.values.mean(1), frame["component"].tolist()
        named = ", ".join(f"{parts[at]} {means[at]:+.3f}" for at in np.argsort(-np.abs(means))[:5])
        said = [
            f"{self.facts['of'].capitalize()} is {self.totals.mean():+.3f} on average over "
            f"{len(self.totals)} texts, at the last token. The largest parts: {named}."
        ]
        if len(np.unique(self.groups)) < 2:
            said.append("With one text there are no intervals.")
        said.append(
            "The final norm's scale is held at its value in each run, and only the direct path to the logits "
            "counts."
        )
        return said

    def figure(self) -> go.Figure:
        """The largest parts as bars."""
        from veridical.interventions.lens_figures import contributions

        return contributions(self)

    def head_figure(self) -> go.Figure:
        """Each head's mean contribution, layers by heads.

        Raises:
            InputError: The model's heads can't be told apart.
        """
        from veridical.interventions.lens_figures import head_grid

        return head_grid(self)

    def report_section(self) -> Section:
        """Findings, both figures and the table."""
        from veridical.reporting.section import Section

        heads = bool((self.table["kind"] == "head").any())
        return Section(
            title=f"Direct contributions to {self.facts['of']} in {self.facts['model']}",
            text="\n\n".join(self.findings()),
            figures=(self.figure(), *([self.head_figure()] if heads else [])),
            tables=(("Contribution of each part, in logits", self.to_frame().round(4)),),
            headline=((f"mean {self.facts['of']}", f"{self.totals.mean():+.3f}"),),
        )

    def __repr__(self) -> str:
        return (
            f"DirectLogits({self.facts['of']} in {self.facts['model']}: {len(self.table)} parts, "
            f"{len(self.totals)} texts, mean {self.totals.mean():+.3g})"
        )

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(line)}</p>" for line in self.findings())
        return said + str(self.to_frame().round(4).to_html(index=False, border=0))


def direct_logits(
    model: HookedModel | Any,
    texts: Any,
    answers: Answers | None = None,
    wrong: Answers | None = None,
    *,
    batch_tokens: int = 2048,
    seed: int = 0,
) -> DirectLogits:
    """Splits the answer's logit at the last token, or its difference to a wrong one, over a model's parts.

    Heads are parts of their own where the attention output is the sum of what they write; in families that
    normalise it before adding it (gemma, olmo2) each attention layer is one part.

    Args:
        model: A `HookedModel`, or anything that `veridical.load` takes; it runs in its present mode.
        texts: A text or chat, a list of these, token ids `[batch, pos]`, or `Pairs`, whose completions are
            the answers when none are given.
        answers: A text or token id for all texts, or one for each (several ids as a list: their mean). When
            not given, each text's own likeliest next token.
        wrong: The same for the wrong answer; without it the answer's logit itself is split.
        batch_tokens: Most tokens in one batch, padding included.
        seed: Of the resamples behind the intervals.

    Raises:
        ModelError: The stream is not the sum of its parts (bert, opt with norms after), or the parts do not
            sum to the model's own logits.
        InputError: Answers that do not fit, or a model without an unembedding of the stream.
    """
    from veridical.models import load

    model = load(model)
    graph, given = Graph.of(model), one_sided(model, texts)
    names, table = _parts(model, graph)
    matrix, bias = _unembedding(model)
    directions = (
        None if answers is None and given.answers is None else _directions(model, given, answers, wrong)
    )
    if directions is None and wrong is not None:
        raise InputError("wrong= needs answers=: the difference of which logits?")
    rows = [ids[real].tolist() for ids, real in zip(given.clean["input_ids"], given.mask)]
    step = max(1, batch_tokens // given.width)
    values, totals = [], []
    with torch.no_grad():
        for first in range(0, len(rows), step):
            inputs = model.batch(rows[first : first + step], padding_side="left")
            run = model.run(inputs, read=names)
            picked = None if directions is None else directions[first : first + step]
            part, total = _split(model, graph, run, matrix, bias, picked)
            values.append(part)
            totals.append(total)
    kept = torch.cat(values, 1).cpu().numpy()
    groups = np.arange(len(rows)) if given.groups is None else np.asarray(given.groups)
    of = "the logit of the answer" if wrong is None else "the logit difference of right and wrong answer"
    facts = {
        "model": model.path,
        "model_fingerprint": model.fingerprint(),
        "of": of if directions is not None else "the logit of the likeliest next token",
        "seed": seed,
    }
    present = np.array([kind not in ("positions", "attn_bias") for kind in table["kind"]]) | kept.any(1)
    return DirectLogits(
        table.loc[present].reset_index(drop=True),
        kept[present],
        torch.cat(totals).cpu().numpy(),
        groups,
        facts,
    )


def _parts(model: HookedModel, graph: Graph) -> tuple[list[str], pd.DataFrame]:
    """Sites to read, and one line per part."""
    kinds = ["embed", "resid_pre", "attn_out" if graph.whole_attention else "z", "mlp_out"]
    wanted = {Site("embed"), Site("resid_pre", 0), Site("resid_post", model.n_layers - 1), Site("ln_final")}
    wanted |= {Site(kind, layer) for kind in kinds[2:] for layer in range(model.n_layers)}
    names = [site.name for site in model.architecture.places if site in wanted]
    lines: list[tuple[str, str, int | None, int | None]] = [
        ("embed", "embed", None, None),
        ("positions", "positions", None, None),
    ]
    for layer in range(graph.n_layers):
        if graph.whole_attention:
            lines.append((f"attn.{layer}", "attn", layer, None))
        else:
            lines += [(f"head.{layer}.{head}", "head", layer, head) for head in range(graph.n_heads)]
            lines.append((f"attn_bias.{layer}", "attn_bias", layer, None))
        if graph.has_mlp[layer]:
            lines.append((f"mlp.{layer}", "mlp", layer, None))
    lines.append(("constant", "constant", None, None))
    return names, pd.DataFrame(lines, columns=["component", "kind", "layer", "head"], dtype=object)


def _split(
    model: HookedModel, graph: Graph, run: Any, matrix: Tensor, bias: Tensor, picked: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What each part adds, `[parts, batch]` float64, and the totals `[batch]`."""
    last = {name: value[:, -1:] for name, value in run.values.items()}
    stream = last[Site("resid_post", model.n_layers - 1).name][:, 0].double()
    logits = run.logits[:, -1].double()
    if picked is None:
        picked = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1])
    weights = picked.to(stream) @ matrix.to(stream).T
    gain, centred, offset = _norm(model, stream)
    directions = weights * gain
    if centred:
        directions = directions - directions.mean(-1, keepdim=True)
    vectors = _vectors(model, graph, last)
    values = [vector.double() @ directions[..., None] for vector in vectors]
    constant = weights @ offset + picked.to(stream) @ bias.to(stream)
    found = torch.cat([*(value[..., 0].T for value in values), constant[None]])
    totals = found.sum(0)
    _check(model, found, (picked.to(stream) * logits).sum(-1), stream, directions, constant)
    return found, totals


def _vectors(model: HookedModel, graph: Graph, last: Mapping[str, Tensor]) -> list[Tensor]:
    """What the parts write at the last token, each `[batch, parts, d_model]`, in the table's order."""
    start = last[Site("resid_pre", 0).name]
    embed = last.get(Site("embed").name, start)
    if embed.shape != start.shape:
        embed = start
    found = [embed, start - embed]
    for layer in range(model.n_layers):
        if graph.whole_attention:
            found.append(last[Site("attn_out", layer).name])
        else:
            bias = output_projection(model, layer)[1]
            found.append(head_contributions(model, layer, last[Site("z", layer).name])[:, 0])
            found.append(torch.zeros_like(start) if bias is None else bias.to(start).expand_as(start))
        if graph.has_mlp[layer]:
            found.append(last[Site("mlp_out", layer).name])
    return found


def _norm(model: HookedModel, stream: Tensor) -> tuple[Tensor, bool, Tensor]:
    """The final norm with its scale held: `norm(x) = gain * (x - mean, if centred) + offset` at `stream`.

    Told from what the norm itself does to the stream and to zero: a LayerNorm does not see a constant that is
    added, an RMSNorm does.

    Returns:
        gain `[batch, d_model]` (the scale in it), whether it is centred, offset `[d_model]`.
    """
    place = model.architecture.places.get(Site("ln_final"))
    if place is None:
        return torch.ones_like(stream), False, stream.new_zeros(stream.shape[-1])
    kind = model.dtype

    def norm(x: Tensor) -> Tensor:
        return place.module(x.to(kind)[:, None])[:, 0].double()

    offset = norm(torch.zeros_like(stream[:1]))[0]
    plain = norm(stream) - offset
    shift = stream.square().mean(-1, keepdim=True).sqrt()
    near = 1e-2 * float(plain.abs().max())
    centred = bool(torch.allclose(norm(stream + shift) - offset, plain, rtol=0, atol=near))
    base = stream - stream.mean(-1, keepdim=True) if centred else stream
    # The gain of each dimension, from a large vector without zeros (so that the norm's epsilon is nothing).
    signs = torch.ones_like(stream[:1])
    signs[:, 1::2] = -1
    if centred:
        signs = signs - signs.mean(-1, keepdim=True)
    large = norm(signs * 1e3) - offset
    gain = (large / signs)[0]
    scaled = gain * base
    scale = (plain * scaled).sum(-1, keepdim=True) / scaled.square().sum(-1, keepdim=True)
    return gain * scale, centred, offset


def _unembedding(model: HookedModel) -> tuple[Tensor, Tensor]:
    """`[d_model, vocabulary]` and its bias `[vocabulary]`."""
    from veridical import lens
    from veridical.architectures import inner

    matrix = unembedding(model).detach()
    if len(matrix) != model.d_model:
        raise InputError(
            f"{model.path} projects the residual stream from {model.d_model} to {len(matrix)} dimensions "
            "before unembedding; there is no direct path to follow"
        )
    if lens.is_lens(model.model):
        bias = getattr(model.model, "b_U", None)
    else:
        bias = getattr(inner(model.model).get_output_embeddings(), "bias", None)  # type: ignore[operator]
    return matrix, matrix.new_zeros(matrix.shape[1]) if bias is None else bias.detach()


def _directions(model: HookedModel, given: Any, answers: Answers | None, wrong: Answers | None) -> Tensor:
    """How much each logit counts, `[texts, vocabulary]`."""
    name = "logprob" if wrong is None else "logit_diff"
    metric = as_metric(name, model, answers, wrong, inputs=given)
    size = unembedding(model).shape[1]

    def shares(ids: Tensor) -> Tensor:
        ids = ids.expand(len(given), -1)
        real = (ids >= 0).double()
        found = torch.zeros(len(given), size, dtype=torch.float64, device=ids.device)
        return found.scatter_add_(1, ids.clamp(min=0), real / real.sum(1, keepdim=True))

    targets = metric.targets or {}
    found = shares(targets["answers"])
    return found - shares(targets["wrong"]) if wrong is not None else found


def _check(
    model: HookedModel, found: Tensor, expected: Tensor, stream: Tensor, directions: Tensor, constant: Tensor
) -> None:
    """Refuses parts that do not sum to what the whole stream gives, or to the model's own logits."""
    exact = model.dtype in (torch.float32, torch.float64)
    size = found.abs().sum(0) + 1e-9
    whole = (stream * directions).sum(-1) + constant
    cap = getattr(model.architecture.config, "final_logit_softcapping", None)
    apart = [(found.sum(0) - whole).abs() / size]
    if not cap:
        apart.append((whole - expected).abs() / size)
    if float(torch.stack(apart).max()) > (1e-4 if exact else 5e-2):
        raise ModelError(
            f"{model.path}: the parts of the residual stream do not sum to its logits, so this "
            f"{model.architecture.model_type} has something between them that is not known here"
        )
