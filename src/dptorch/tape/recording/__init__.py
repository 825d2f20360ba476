"""Watch a model run: every torch function is seen, every trainable parameter is detached and tapped."""
