"""Predictive uncertainty behind one scikit-learn-style API."""

__version__ = "0.1.0"
