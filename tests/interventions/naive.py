"""The slow, obvious way: one hooked forward for each patch."""

import torch

from veridical.sites import HEAD_KINDS


def batches(model, rows, side="left"):
    """Inputs of token rows, and the column of each row's first token."""
    inputs = model.batch(rows, padding_side=side)
    width = inputs["input_ids"].shape[1]
    return inputs, [0 if side == "right" else width - len(row) for row in rows]


def logits_of(model, inputs, lengths, starts, write=None):
    """Logits at each row's last token, `[rows, vocabulary]`."""
    logits = model.run(inputs, write=write or {}).logits
    if logits.dim() == 2:
        return logits
    last = [start + length - 1 for start, length in zip(starts, lengths)]
    return logits[torch.arange(len(last)), last]


def put(value, new, kind, rows, columns, head):
    """`value` with that of the other run at some places; a pattern by query."""
    value = value.clone()
    for row, column in zip(rows, columns):
        if kind == "pattern":
            at = (row, slice(None) if head is None else head, column)
        elif kind in HEAD_KINDS and head is not None:
            at = (row, column, head)
        else:
            at = (row, column)
        value[at] = new[at]
    return value


def sweep(model, base, source, sites, heads=None, side="left", positions=None):
    """`{(site, head, position): logits [rows, vocabulary]}` of every patch, positions counted from each row's
    end (so that they mean the same for every row), and the logits of the base."""
    lengths = [len(row) for row in base]
    inputs, starts = batches(model, base, side)
    others, _ = batches(model, source, side)
    named = model.resolve(sites)
    with torch.no_grad():
        seen = model.run(others, read=named).values
        unpatched = logits_of(model, inputs, lengths, starts)
        found = {}
        for site in named:
            split = site.kind in (*HEAD_KINDS, "pattern") and heads == "all"
            count = seen[site.name].shape[1 if site.kind == "pattern" else 2] if split else 1
            for head in range(count) if split else [None]:
                for position in positions or range(-max(lengths), 0):
                    rows = [row for row, length in enumerate(lengths) if length >= -position]
                    columns = [starts[row] + lengths[row] + position for row in rows]
                    new = seen[site.name]

                    def edit(value, new=new, site=site, rows=rows, columns=columns, head=head):
                        return put(value, new, site.kind, rows, columns, head)

                    key = site.name, -1 if head is None else head, position
                    found[key] = logits_of(model, inputs, lengths, starts, {site: edit})
    return found, unpatched
