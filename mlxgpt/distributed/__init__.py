"""Training on several machines, or in several processes: their group, what they send each other,
whether they agree. A process alone is a group of size 1.
"""
