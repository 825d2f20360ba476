"""dptorch inside other libraries' trainers; one module a library, imported by who uses it."""
