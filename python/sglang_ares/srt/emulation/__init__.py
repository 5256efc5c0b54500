"""Emulated workers: everything of a worker is real but the model's forward, which is slept."""
