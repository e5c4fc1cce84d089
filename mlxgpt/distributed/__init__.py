"""Training on several machines or in several processes."""
