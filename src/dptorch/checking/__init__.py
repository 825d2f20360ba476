"""What `dptorch.check` is made of: fixed chance, comparison with a loop, and the report."""
