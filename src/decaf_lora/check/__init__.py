"""Is everything ready for a run? Each thing is one line: right, or what to do if not.

A run of one's own (`decaf check`) and a site of a federation (`decaf federation check`) are checked in the same way.
"""

from decaf_lora.check.findings import Finding, Verdict, look, summary
from decaf_lora.check.rehearsal import check, rehearse

__all__ = ["Finding", "Verdict", "check", "look", "rehearse", "summary"]
