"""Other libraries' own tests and examples, run on the adapters (``python -m tests.peers``)."""
