"""Errors, settings, logs, paths, devices. Knows nothing of markets."""
