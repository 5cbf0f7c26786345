"""Measurements on real feature maps: ``python -m benchmarks``."""
