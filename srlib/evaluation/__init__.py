"""Scores of learned systems, each with the number of images behind it."""
