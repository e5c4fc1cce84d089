"""mlxgpt and other libraries at the same tasks, each in a fresh process: how fast they are here."""
