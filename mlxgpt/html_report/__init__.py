"""HTML reports of runs, comparisons and benchmarks: one self-contained file each."""
