"""Sweeps: which rank reduction makes a model better."""
