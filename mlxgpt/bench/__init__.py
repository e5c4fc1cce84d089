"""Benchmarks of training and generation, of distributed training steps, and their reports."""
