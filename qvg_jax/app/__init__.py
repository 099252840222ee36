"""The `qvg` command and the runs behind it."""
