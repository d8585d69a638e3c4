"""Solvers of the literature: one paper, one file, one line in the entry-point table."""
