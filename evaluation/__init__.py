"""Positions and returns: accounting, metrics, backtests, reports. Knows no model."""
