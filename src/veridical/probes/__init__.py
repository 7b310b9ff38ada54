"""Linear probes: one file per estimator, one solver for all fits, evaluation apart from both.

`logistic` is the estimator, `solver` its exact solution for many problems at once. `data` decides which rows
count, `sweep` fits and selects, `evaluate` and `firing` measure on held-out pairs, `baseline` reads the text
alone, `result` is what comes back, `verdict` puts it into words, `saved` and `card` keep it, `tokens` shows
a probe over a text.
"""

from veridical.probes.logistic import LogisticProbe
from veridical.probes.result import ProbeSweep
from veridical.probes.saved import load_probe
from veridical.probes.sweep import fit_probes
from veridical.probes.tokens import TokenView, view_tokens

__all__ = ["LogisticProbe", "ProbeSweep", "TokenView", "fit_probes", "load_probe", "view_tokens"]
