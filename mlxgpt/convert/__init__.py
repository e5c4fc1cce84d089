"""Import and export of models in the formats of other libraries. Does not depend on training."""
