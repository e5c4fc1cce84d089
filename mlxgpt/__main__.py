"""`python -m mlxgpt` is `mlxgpt`."""

from mlxgpt.cli.main import run_and_exit

run_and_exit()
