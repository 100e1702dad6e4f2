"""`python -m stillhouse`: the command `stillhouse`."""

from stillhouse.cli.main import main

main()
