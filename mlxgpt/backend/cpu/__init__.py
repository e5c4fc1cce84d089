"""What is done for a Linux CPU alone. Only `backend` imports it."""
