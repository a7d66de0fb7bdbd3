"""`python -m fastpie`."""

from fastpie.cli import main

main()
