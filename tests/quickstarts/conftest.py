"""Code of documents is run by the tests, and is none itself."""

collect_ignore_glob = ["documents/*"]
