"""The card of a saved adapter: how to load it, what it was measured to do, and what it was not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veridical.steering.adapter import AdapterReport

LINE = "| {} | {:.3f} | {:.3f} | {:+.3f} | {} |"


def card(report: AdapterReport, proof: Mapping[str, Any]) -> str:
    """The card as markdown."""
    facts = report.facts
    table = [
        LINE.format(row["measure"], row["plain"], row["adapted"], row["change"], int(row["n"]))
        for row in report.table.to_dict("records")
    ]
    dial = [
        f"| {row['strength']:g} | {row['target']:.3f} | {row['kept']:.3f} | {row['kl']:.4f} |"
        for row in report.dial.to_dict("records")
    ]
    right, kl = proof["right"], proof["kl"]
    low, high = facts["range"]
    chosen = f"Answers move by {proof['moved']:.3f} nats on the mean."
    if right["base"] is not None:
        chosen += (
            f" The wanted one is the likeliest in {right['base']:.3f} of the rows without, "
            f"{right['unmerged']:.3f} with the adapter, {right['merged']:.3f} merged."
        )
    return f"""---
base_model: {facts["model"]}
library_name: peft
tags:
- lora
- steering
---

# A steering adapter for {facts["model"]}

{" ".join(report.findings())}

It is a plain LoRA. Loading it needs no code but PEFT's:

```python
from peft import PeftModel
model = PeftModel.from_pretrained(base, "this/folder")     # or .merge_and_unload()
```

`veridical.steering.Adapter.load("this/folder")` also has the report, the rows that it is of, and the dial.

## Measured on held-out rows

| measure | without | with | change | n |
| --- | --- | --- | --- | --- |
{chr(10).join(table)}

## Strength

Claimed from {low:g} to {high:g}, where it was measured to be monotone.

| strength | {facts["target"]} | {facts["kept"] or "-"} | neutral KL |
| --- | --- | --- | --- |
{chr(10).join(dial)}

## Proof

Measured again from these files ({proof["how"]}), on
{proof["questions"]} rows and {proof["texts"]} texts. {chosen}

KL on neutral text {kl["unmerged"]:.4f} unmerged, {kl["merged"]:.4f} merged, in
nats a token.

## Limits

What was measured holds for prompts like those of the rows in `data.parquet`, on the base with the fingerprint
{facts["model_fingerprint"]}. Strengths outside the claimed range and other bases were not measured.
"""
