"""`dptorch serve`: private predictions over HTTP. FastAPI is imported by who uses it."""
