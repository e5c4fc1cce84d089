"""Which idea brings what, with its error: variants of a training side by side."""
