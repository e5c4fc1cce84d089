"""GPT-2 and what its predictions cost, and how both are computed well on a CPU. Knows shapes and
arrays; nothing of texts, runs or training.
"""
