"""Offline data sets: loaded from files, OGBench, Minari or the demo, checked and standardised."""

from common.data.load import load_dataset

__all__ = ["load_dataset"]
