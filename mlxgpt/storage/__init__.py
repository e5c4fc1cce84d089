"""A run's folder, its logs and its checkpoints: written atomically, verified when read."""
