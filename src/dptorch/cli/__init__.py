"""The command line: `dptorch`, one file a command."""
