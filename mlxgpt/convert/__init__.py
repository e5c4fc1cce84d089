"""Import and export of models: formats, parameter names and layouts of other libraries. Knows
nothing of training.
"""
