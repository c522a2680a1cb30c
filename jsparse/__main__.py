"""`python -m jsparse` is the command `jsparse`."""

from jsparse.cli import main

main()
