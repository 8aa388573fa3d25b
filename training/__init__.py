"""Command-line trainers and the recipe that they fit."""
