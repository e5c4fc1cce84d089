"""`python -m mlxgpt` is `mlxgpt`."""

from mlxgpt.cli.main import run

run()
