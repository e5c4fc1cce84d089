"""Other people's weights in, ours out: formats, names, layouts. Knows a model's arrays and a
tokenizer; nothing of training.
"""
