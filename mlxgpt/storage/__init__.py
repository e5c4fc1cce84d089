"""Run folders, logs and checkpoints: written atomically, verified when loaded."""
