"""`python -m crosslens` is the command line."""

from crosslens.cli import main

main()
