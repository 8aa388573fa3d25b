"""From bars to positions: saved models, forecasts, intervals, sizing."""
