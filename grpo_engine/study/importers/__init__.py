"""Logs of other frameworks as the same long table, so that their users can fit laws too.

    csv_file.py     read_csv          any CSV file, with a mapping of columns; also one column a size
    trl.py          read_trl          TRL / transformers: trainer_state.json (log_history)
    verl.py         read_verl         verl: the file logger's jsonl, or captured console output
    wandb.py        read_wandb_csv    a chart or a run history exported from Weights & Biases
    digitized.py    read_digitized    points read off published figures, as in `digitized_base_D.csv`
    folder.py       import_logs       any of the first four, into the `runs.parquet` of a folder that `study fit` and
                                      `report` read
    rows.py                           what the readers share: rows, checks of values, encodings

Every reader gives a table with `records.table_schema()`; several are joined by `pyarrow.concat_tables`. What a log does
not say (parameters, prompts a step, answers a prompt) comes from a `RunInfo`; what nobody says stays null. Nothing is
guessed: a metric that is not a pass rate between 0 and 1, or a choice between several, is an error that names the file,
the column and the row. What is left out of a log is counted, and said as a warning.
"""

from grpo_engine.study.importers.csv_file import read_csv
from grpo_engine.study.importers.digitized import read_digitized
from grpo_engine.study.importers.folder import FORMATS, TABLE_FILE, import_logs, read_table, write_table
from grpo_engine.study.importers.rows import Metric, RunInfo
from grpo_engine.study.importers.trl import read_trl
from grpo_engine.study.importers.verl import read_verl
from grpo_engine.study.importers.wandb import read_wandb_csv

__all__ = [
    "FORMATS",
    "TABLE_FILE",
    "Metric",
    "RunInfo",
    "import_logs",
    "read_csv",
    "read_digitized",
    "read_table",
    "read_trl",
    "read_verl",
    "read_wandb_csv",
    "write_table",
]
