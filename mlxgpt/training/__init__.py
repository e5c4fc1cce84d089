"""Training: from a request to a trained run. Prints nothing; callbacks get the events."""
