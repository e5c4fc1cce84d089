"""`mlxgpt play`: a web UI to inspect a model, and an OpenAI-compatible API."""
