"""A stand-in for a loaded model: quick to start in a subprocess, and slow or broken where a test wants it.

Each vector follows from its row's own tokens alone, so a test can say what must be read without running
anything.
"""

import time

import torch

from veridical.sites import Site
from veridical.tokens import Encoded

WIDTH = 8
PAD = 0


class FakeModel:
    """`layers` sites of width 8; the value of a site is a function of layer, token id, and position."""

    kind = "causal"
    context_length = 4096
    device = torch.device("cpu")
    dtype = torch.float32
    tokenizer = None
    path = "fake"

    def __init__(self, layers=3, delay=0.0, seed="a", poison=None, scale=1.0):
        self.n_layers, self.delay, self.seed, self.poison, self.scale = layers, delay, seed, poison, scale
        self.model = torch.nn.Dropout(0.5)  # some module with a mode
        self.batches, self.deepest = [], []

    def resolve(self, spec):
        wanted = [spec] if isinstance(spec, str | Site) else list(spec)
        if "resid_post.*" in wanted:
            return [Site("resid_post", layer) for layer in range(self.n_layers)]
        return sorted((Site.parse(one) for one in wanted), key=lambda site: site.layer)

    def width(self, site):
        return (WIDTH,)

    def fingerprint(self):
        return f"fake-{self.seed}"

    def encode(self, prompts, completions=None, **options):
        found = []
        for i, prompt in enumerate(prompts):
            said = (completions[i] or "") if completions else ""
            text = prompt + said
            ids = tuple(ord(c) for c in text)
            spans = tuple((k, k + 1) for k in range(len(text)))
            found.append(Encoded(ids, text, spans, len(prompt), len(prompt)))
        return found

    def batch(self, encoded, padding_side="right"):
        width = max(len(one.ids) for one in encoded)
        ids = torch.full((len(encoded), width), PAD)
        mask = torch.zeros_like(ids)
        for i, one in enumerate(encoded):
            place = slice(0, len(one.ids)) if padding_side == "right" else slice(width - len(one.ids), width)
            ids[i, place] = torch.tensor(one.ids)
            mask[i, place] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def run(self, inputs, read=(), write=None, stop=False):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        self.batches.append(tuple(ids.shape))
        place = (mask.cumsum(1) - 1).clamp(min=0)
        sites = sorted(map(Site.parse, read), key=lambda site: site.layer)
        self.deepest.append(sites[-1].layer)
        for site in sites:
            time.sleep(self.delay)
            value = value_at(site.layer, ids, place) * self.scale
            value[mask == 0] = float("nan")  # padding must never be read
            if self.poison is not None:
                value[ids == self.poison] = float("nan")
            read[site.name](value)


def value_at(layer, ids, place):
    """[..., WIDTH] for integer tensors of token ids and positions of the same shape."""
    coordinate = torch.arange(1, WIDTH + 1)
    return (
        torch.sin((ids.unsqueeze(-1) * 0.37 + layer * 1.7) * coordinate) + 0.01 * place.unsqueeze(-1) + layer
    )
