"""The README of a saved SAE: what it reads, how well it reconstructs, and what it cannot show."""

from __future__ import annotations

from typing import TYPE_CHECKING

from veridical.probes.card import interval, number

if TYPE_CHECKING:
    from veridical.saes.base import SAE

USE = """```python
import veridical as vd

sae = vd.load_sae("this folder")
latents = sae.encode(x)  # x: activations [rows, {d_in}]{site}
sae.evaluate(model, held_out_texts)
```"""
PEER = """```python
import sae_lens

sae = sae_lens.SAE.load_from_disk("this folder")  # the same output
```"""
LIMITS = (
    "A latent is a direction that was useful for reconstruction. That it is a feature of the model, and what "
    "it means, has to be shown: by its examples, by ablating it, by steering.",
    "Figures hold for texts like the held-out ones.",
    "It belongs to the model whose fingerprint is given; another checkpoint has other directions.",
)


def card(sae: SAE, *, saelens_reads: bool) -> str:
    """The card of an SAE as Markdown."""
    from veridical.saes.saved import origin_of

    origin, config = origin_of(sae), sae.config
    where = f" at `{config.site}`" if config.site else ""
    to = f" to `{config.target_site}`" if config.target_site else ""
    facts = [
        ("architecture", f"{config.architecture}, {sae.describe()}"),
        ("latents", f"{sae.width:,}"),
        ("width", f"{sae.d_in}" if sae.d_in == sae.d_out else f"{sae.d_in} to {sae.d_out}"),
        ("site", (config.site or ", ".join(config.sites) or "not recorded") + to),
        ("model", origin.model or "not recorded"),
        ("model fingerprint", origin.model_fingerprint or "not recorded"),
        ("data fingerprint", origin.data_fingerprint or "not recorded"),
        ("tokens read", origin.tokens or "not recorded"),
        ("trained on", f"{origin.trained_on:,} tokens" if origin.trained_on else "not recorded"),
        ("seed", str(config.seed)),
    ]
    if origin.source is not None:
        facts.append(("read from", origin.source))
    site = f" at {config.site}" if config.site else ""
    parts = [f"# SAE {config.label}{where}", _table(facts), USE.format(d_in=sae.d_in, site=site)]
    parts.append(PEER if saelens_reads else "SAELens has no class for this architecture.")
    if origin.metrics:
        parts += ["## Figures on held-out rows", _table(_figures(dict(origin.metrics)))]
    parts += ["## Limits", "\n".join(f"- {line}" for line in (*origin.notes, *LIMITS))]
    return "\n\n".join(parts) + "\n"


def _figures(metrics: dict[str, float | None]) -> list[tuple[str, str]]:
    lines = []
    for name, value in metrics.items():
        if name.endswith(("_low", "_high")):
            continue
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        said = number(value) if low is None or high is None else interval(value, low, high)
        lines.append((name.replace("_", " "), said))
    return lines


def _table(lines: list[tuple[str, str]]) -> str:
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in lines]
    return "\n".join(["| | |", "| --- | --- |", *rows])


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
