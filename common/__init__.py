"""Data loading, evaluation and reporting: what the two scripts share. Nothing algorithmic lives here."""
