"""Replay one workload against a cluster, compare the answers, report the figures."""
