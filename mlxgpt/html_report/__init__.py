"""`mlxgpt report`: self-contained HTML reports of runs, comparisons and benchmarks."""
