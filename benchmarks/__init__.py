"""Measured comparisons: speed and accuracy against peers, as ratios in one run."""
