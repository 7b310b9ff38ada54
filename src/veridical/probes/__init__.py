"""Linear probes: one file per estimator, one solve for all fits of a sweep, evaluation apart from both.

Estimators of one vector: `logistic`, `ridge`, `mass_mean`, `lda`, `lat`, `ccs`, `ttpd`, and `stacked` over
several sites; of a sequence of tokens: `mean_tokens`, `max_tokens`, `rolling`, `attention`, `mil`. `base`
is what all share, `kinds` their names, `solver` the exact logistic solution for many problems at once.

`data` decides which rows count, `sweep` fits and selects, `evaluate`, `controls`, `firing` and
`calibration` measure on held-out pairs, `baseline` reads the text alone, `result` is what comes back,
`verdict` puts it into words. `honesty` keeps a lie apart from the instruction to lie, `transfer` tests
every probe on every data set, `judged` a saved probe on others. `erasure` takes a label out of activations,
`causal` tries a direction out in the model, `monitor` runs a probe while the model writes, `tokens` shows
one over a text. `saved`, `saved_eraser` and `saved_sweep` keep what was found, each sealed by
checksums (`sealed`), `card` writes the README beside a probe; `fits` refuses the wrong model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from veridical.lazy import lazy

if TYPE_CHECKING:
    from veridical.probes.attention import AttentionProbe
    from veridical.probes.causal import causal_check
    from veridical.probes.ccs import CCSProbe
    from veridical.probes.erasure import LeaceEraser, ProjectionEraser
    from veridical.probes.erasure_check import check_erasure
    from veridical.probes.honesty import honesty_protocol
    from veridical.probes.judged import judge_probe
    from veridical.probes.lat import LATProbe
    from veridical.probes.lda import LDAProbe
    from veridical.probes.learning import learning_curve
    from veridical.probes.logistic import LogisticProbe
    from veridical.probes.mass_mean import MassMeanProbe
    from veridical.probes.max_tokens import MaxTokenProbe
    from veridical.probes.mean_tokens import MeanTokenProbe
    from veridical.probes.mil import MILProbe
    from veridical.probes.model_transfer import transfer_to
    from veridical.probes.result import ProbeSweep
    from veridical.probes.ridge import RidgeProbe
    from veridical.probes.rolling import RollingProbe
    from veridical.probes.saved import load_probe
    from veridical.probes.saved_eraser import load_eraser
    from veridical.probes.sequence import Sequences
    from veridical.probes.stacked import StackedProbe
    from veridical.probes.sweep import fit_probes
    from veridical.probes.tokens import TokenView, view_tokens
    from veridical.probes.transfer import transfer_matrix
    from veridical.probes.ttpd import TTPDProbe

_HOME = {
    "AttentionProbe": "attention",
    "CCSProbe": "ccs",
    "LATProbe": "lat",
    "LDAProbe": "lda",
    "LeaceEraser": "erasure",
    "LogisticProbe": "logistic",
    "MILProbe": "mil",
    "MassMeanProbe": "mass_mean",
    "MaxTokenProbe": "max_tokens",
    "MeanTokenProbe": "mean_tokens",
    "ProbeSweep": "result",
    "ProjectionEraser": "erasure",
    "RidgeProbe": "ridge",
    "RollingProbe": "rolling",
    "Sequences": "sequence",
    "StackedProbe": "stacked",
    "TTPDProbe": "ttpd",
    "TokenView": "tokens",
    "causal_check": "causal",
    "check_erasure": "erasure_check",
    "fit_probes": "sweep",
    "honesty_protocol": "honesty",
    "judge_probe": "judged",
    "learning_curve": "learning",
    "load_eraser": "saved_eraser",
    "load_probe": "saved",
    "transfer_matrix": "transfer",
    "transfer_to": "model_transfer",
    "view_tokens": "tokens",
}
__all__ = [
    "AttentionProbe",
    "CCSProbe",
    "LATProbe",
    "LDAProbe",
    "LeaceEraser",
    "LogisticProbe",
    "MILProbe",
    "MassMeanProbe",
    "MaxTokenProbe",
    "MeanTokenProbe",
    "ProbeSweep",
    "ProjectionEraser",
    "RidgeProbe",
    "RollingProbe",
    "Sequences",
    "StackedProbe",
    "TTPDProbe",
    "TokenView",
    "causal_check",
    "check_erasure",
    "fit_probes",
    "honesty_protocol",
    "judge_probe",
    "learning_curve",
    "load_eraser",
    "load_probe",
    "transfer_matrix",
    "transfer_to",
    "view_tokens",
]

__getattr__, __dir__ = lazy(__name__, _HOME)
