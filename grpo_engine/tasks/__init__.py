"""Where problems come from: generated ones (`micro`) and files of them (`files`)."""
