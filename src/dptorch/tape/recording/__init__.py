"""Record a model: see every torch function, detach and tap every trainable parameter."""
