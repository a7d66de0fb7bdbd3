"""`report.html` of a run, and its plots (`fastpie.report.plots`). Needs `fastpie[report]`."""

from fastpie.report.write import write_report

__all__ = ["write_report"]
