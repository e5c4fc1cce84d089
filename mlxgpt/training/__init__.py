"""Training loop, optimizers, checkpointing and resuming. Prints nothing; events go to callbacks."""
