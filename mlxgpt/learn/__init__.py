"""The chapters of the course in docs/learn, and the checks of a reader's functions."""
