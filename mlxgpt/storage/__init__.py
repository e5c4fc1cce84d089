"""A run's folder and its checkpoints: written atomically, read warily. What is in them is made
elsewhere.
"""
