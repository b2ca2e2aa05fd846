"""python -m lastgood: the command line where the script isn't on the path."""

from lastgood.cli.main import main

main()
