"""Sampling by seed and position, so that a sampled request survives a move unchanged."""
