"""The site of the documentation: what is on it and how it is built (``make docs``).

staging    the pages: docs/, examples/, reference and changelog, their links rewritten
reference  public names with their text, and the commands with their options
notebooks  notebooks, run and written as pages
links      links of pages and of built files that lead nowhere
figures    the pictures of README.md and docs/
"""
