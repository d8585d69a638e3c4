"""The bundled plugins of sdeflow: one paper, one file, one line in the entry-point table."""
