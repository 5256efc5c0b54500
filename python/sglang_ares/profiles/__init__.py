"""What a worker's hardware and model can do, as small JSON files."""
