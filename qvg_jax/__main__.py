"""Runs the `qvg` command: python -m qvg_jax."""

import sys

from qvg_jax.app.cli import main

sys.exit(main())
