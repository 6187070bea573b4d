"""Data, environments, evaluation and run folders: what both scripts share around the algorithm."""
