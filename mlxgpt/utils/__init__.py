"""Files, random seeds and the error type, used by every other package."""
