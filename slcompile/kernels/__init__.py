"""Triton only, imported lazily, the same stems as ops/."""
