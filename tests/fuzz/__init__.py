"""Rooms of `make fuzz`, one for each promise: support/fuzzing.py says how they are tried."""
