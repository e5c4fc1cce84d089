"""`mlxgpt play`: a page to see inside a model, and a door for other programs; on this machine."""
