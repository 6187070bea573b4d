"""Data loading, evaluation and reporting: what the scripts share. Nothing here is algorithmic."""
