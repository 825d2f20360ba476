"""Compose dominating pairs: to nine digits (`contour`) or as an upper bound (`tilted`)."""
