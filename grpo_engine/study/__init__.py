"""The scaling study: which cells, running them, fitting laws to their records, and the report."""
