"""SAEs of other libraries, read as ours, and ours written as theirs."""

from __future__ import annotations

from veridical.saes.formats.dictionary_learning import from_dictionary_learning
from veridical.saes.formats.hub import pull_sae, push_sae
from veridical.saes.formats.saelens import from_saelens, to_saelens
from veridical.saes.formats.sparsify import from_sparsify

__all__ = [
    "from_dictionary_learning",
    "from_saelens",
    "from_sparsify",
    "pull_sae",
    "push_sae",
    "to_saelens",
]
