"""Benchmarks: speed of both tiers and of several ranks, and the report of them."""
