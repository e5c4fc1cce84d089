"""`python -m mlxgpt` is `mlxgpt`."""

from mlxgpt.cli import run

run()
