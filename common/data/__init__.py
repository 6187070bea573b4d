"""Offline data sets: loaded from files, OGBench, Minari or the demo, checked and standardised."""

from common.data.cache import cached_labels
from common.data.load import load_dataset

__all__ = ["cached_labels", "load_dataset"]
