"""Benchmarks of mlxgpt and other libraries on the same tasks, each in a fresh process."""
