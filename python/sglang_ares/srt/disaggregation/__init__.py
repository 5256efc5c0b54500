"""Live migration of running requests between decode workers."""
