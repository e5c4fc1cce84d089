"""How good a model is: loss and bits per byte over a text, and what its own texts are worth.
Changes nothing.
"""
