"""Prices, features, targets and splits: everything before a model."""
