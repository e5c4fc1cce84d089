"""What was measured, as something to read: the benchmark of both tiers, and its report."""
