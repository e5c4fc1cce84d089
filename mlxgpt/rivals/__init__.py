"""Others at the same work as we: how fast they are here, each in a process of its own."""
