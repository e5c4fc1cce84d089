"""`mlxgpt play`: a page to see inside a model, and an API for other programs; on this machine."""
