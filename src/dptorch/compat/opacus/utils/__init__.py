"""Names of ``opacus.utils``."""
