"""The page of a run: every table of a run directory as a figure with its definition and its numbers, offline.

A figure is a function from tables to a `Chart`; `sections.SECTIONS` lists them with their titles, definitions and what
to do when a table is missing; `page` draws the list into HTML. To add a figure, write the function and list it.
"""

from crosslens.report.page import write_report

__all__ = ["write_report"]
