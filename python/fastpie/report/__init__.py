"""`report.html` of a run, and its plots. Needs `fastpie[report]`.

Single plots: `fastpie.report.plots` (of a run), `class_plots` and `group_plots` (of an analysis).
"""

from fastpie.report.figures import write_plots
from fastpie.report.write import write_report

__all__ = ["write_plots", "write_report"]
