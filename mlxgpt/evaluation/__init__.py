"""Evaluation of models: loss and bits per byte, HellaSwag, and sample quality metrics."""
