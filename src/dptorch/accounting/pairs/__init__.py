"""Dominating pairs of accounting events, and the reduction of a history to them."""
