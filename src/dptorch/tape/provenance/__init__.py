"""Whose data each index of a tensor is: tags, their way through writes and sorting, reduced losses."""
