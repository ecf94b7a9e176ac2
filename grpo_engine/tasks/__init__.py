"""Where problems come from: generated ones (`micro`) and files in the parquet format of verl (`parquet`)."""
