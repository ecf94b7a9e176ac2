"""Measurements beside peers: see `run.py`."""
