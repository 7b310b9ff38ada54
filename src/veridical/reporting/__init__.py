"""Results as sections of one self-contained page."""

from veridical.reporting.report import report
from veridical.reporting.section import Reportable, Section

__all__ = ["Reportable", "Section", "report"]
