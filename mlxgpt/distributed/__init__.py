"""Training on several machines or processes: process group, control channel, agreement checks. A
single process is a group of size 1.
"""
