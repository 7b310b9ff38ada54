"""The options of `veridical patch`. Nothing here imports torch."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from veridical.config import STRICT
from veridical.inputs import Inputs, OutFolder


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PatchVerb(Inputs):
    """Finds where two runs part: puts activations of one into the other and measures what comes back.

    Example: veridical patch --model tiny-liar --data honesty --where form=choice taught=True
      --clean-system "Tell the truth." --corrupt-system "Tell a lie."

    Clean and corrupt inputs come from --clean and --corrupt (texts), from the columns clean and corrupt of a
    table (--data), or from questions (--prompts, or the rows of --data) under two system prompts. Their
    token counts have to agree row by row, unless --align is given. Answers come from --answers and --wrong,
    the columns answer and wrong, or the options of the questions.
    """

    data: str | None = None
    """Table of clean and corrupt rows (csv, jsonl, parquet), or pairs with questions: an embedded name, a
    file, a data set folder, or a hub id. One of --data, --clean and --prompts is needed."""
    limit: int | None = None
    """Draw this many pairs of --data's questions with the seed; --examples keeps the first that fit."""
    clean: tuple[str, ...] = ()
    """Texts in which the model does it."""
    corrupt: tuple[str, ...] = ()
    """Texts in which it does not, one for each clean one."""
    prompts: tuple[str, ...] = ()
    """Questions that are asked under both system prompts."""
    clean_system: str | None = None
    """System prompt of the clean run."""
    corrupt_system: str | None = None
    """System prompt of the corrupt run."""
    where: tuple[str, ...] = ()
    """Conditions on the columns of --data, such as form=choice; the first row of each question is taken."""
    answers: tuple[str, ...] = ()
    """Right answers, one for all rows or one for each; their first token counts."""
    wrong: tuple[str, ...] = ()
    """Wrong answers, likewise."""
    examples: int = 16
    """Rows at most. Without --align, rows of the commonest token count are kept, so that columns agree."""
    metric: Literal["logit_diff", "prob", "logprob", "cross_entropy", "kl", "rank"] = "logit_diff"
    """What is measured at the last token."""
    sites: tuple[str, ...] = ("resid_pre.*", "z.*")
    """Sites or globs to patch; q, k, v, z and patterns head by head."""
    direction: Literal["denoising", "noising"] = "denoising"
    """denoising puts clean activations into the corrupt run, noising corrupt into clean."""
    align: Literal["token"] | None = None
    """Match the tokens of rows whose counts differ."""
    source: str | None = None
    """Another model, whose activations on the same inputs are put into --model."""
    attribution: bool = True
    """Put attribution patching, its gradient estimate, beside the exact effects. On by default: it costs two
    forwards and a backward, and shows where the estimate can be trusted."""
    circuit: bool = False
    """Find the edges that carry the difference, check them exactly, and draw them."""
    faithfulness: float = 0.8
    """Share of the difference that the circuit has to carry."""
    bootstrap: int = 500
    """Resamples of examples for the 95 % intervals."""
    batch_tokens: int = 8192
    """Tokens of one forward at most."""
    out: OutFolder = None
    """Folder for everything the run writes; runs/patch-MODEL when not given."""
    seed: int = 0
    """Seed of the resamples, of random circuits, and of the pairs that --limit keeps."""
    progress: bool | None = None
    """Progress bars; by default only on a terminal."""
