"""Leaving training: files that hold merged dense weights."""
