"""Training on several machines, or in several processes of one: the process group, its control
channel, and what all ranks must agree on.
"""
