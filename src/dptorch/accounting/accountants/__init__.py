"""The accountants, one a file, behind `protocol.Accountant`."""
