"""Compare variants of a training run, paired by seed, with confidence intervals."""
