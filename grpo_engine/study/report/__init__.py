"""From the records of a study and its fits.json to figures, tables and one page.

    report/index.html      the page: self-contained, interactive, no network
    report/figures/        every figure as *.png and *.pdf
    report/tables/         every table as *.md and *.tex (booktabs)

    data.py     the finished cells          fits.py     their laws, and what these recommend
    tables.py   the tables                  figures.py  the figures, which ../drawing.py draws
    words.py    what is said in sentences   page.py     the sections, the page and the files

Only records are read, so a report can be remade offline in seconds, and a finished part of a study can be looked at
while the rest runs.
"""

from grpo_engine.study.data import StudyData, load_data
from grpo_engine.study.report.page import REPORT, write_report
from grpo_engine.study.report.tables import law_table

__all__ = [
    "REPORT",
    "StudyData",
    "law_table",
    "load_data",
    "write_report",
]
