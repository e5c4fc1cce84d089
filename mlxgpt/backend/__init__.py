"""How this machine computes: the formulas and the execution that differ by device. Knows arrays;
nothing of models or text.
"""
