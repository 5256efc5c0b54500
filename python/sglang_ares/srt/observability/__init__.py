"""Prometheus series of ARES."""
