"""Files, random seeds and the error type, used by all other packages."""
