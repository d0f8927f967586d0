"""The figures of the report, a function each, with what the page says about it in its decorator.

In: tables of a run. Out: a chart, a table, tinted prompts, or a sentence that says why there is nothing to draw. A file
is about one subject; on a page, the figures of a section stand in the order of their files' names, and within a file in
the order in which they are written. `entries.figure` documents the decorator.
"""
