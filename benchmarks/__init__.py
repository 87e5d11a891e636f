"""Measurements behind every claim; each module is a command that appends rows to `results/`."""
