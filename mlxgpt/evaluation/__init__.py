"""Evaluates a model, which stays as it is: loss and bits per byte over a text, HellaSwag, and the
quality of its samples.
"""
