"""`mlxgpt play`: the web page that looks inside a model, and an OpenAI-compatible API."""
