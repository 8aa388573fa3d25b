"""Walk-forward validation, its metrics, and the verdict."""
