"""Other libraries' names and calls, on the engine of this one: `docs/migrating.md`."""
