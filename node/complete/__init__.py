"""Completeness: whether a Series is whole, whether it is to be analysed, and which one of its Study.

`judge.py` weighs the evidence, `choose.py` picks among the Series of a Study: both pure. `sources.py` asks the sender.
`clock.py` is the job that does it for every case that is due; `service.py` runs it.
"""

from node.complete.clock import check_cases, series_rules
from node.complete.judge import was_interrupted
from node.complete.sources import Sources

__all__ = ["Sources", "check_cases", "series_rules", "was_interrupted"]
