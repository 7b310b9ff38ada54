"""Labelled contrast pairs: schema, loaders, splits by pair, and the check of what a model believes."""

from veridical.pairs.beliefs import BeliefReport, check_beliefs, choose_prompts
from veridical.pairs.prompts import SystemPrompt
from veridical.pairs.schema import Pairs

__all__ = ["BeliefReport", "Pairs", "SystemPrompt", "check_beliefs", "choose_prompts"]
