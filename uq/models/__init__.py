"""Estimators: one module per method, all with the same interface."""
