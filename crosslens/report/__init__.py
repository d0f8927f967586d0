"""The pages of a run: every table of a run directory as a figure with its definition and its numbers, offline.

A figure is a function from tables to a `Chart`; the sections of `sections` and `causes` list them with their titles,
definitions and what to do when a table is missing; `page` makes HTML of the lists. To add a figure, write the function
and list it. What there is of single features is written by `features`, and drawn by the scripts in templates/.
"""

from crosslens.report.page import write_report
from crosslens.report.tracked import log_report

__all__ = ["log_report", "write_report"]
