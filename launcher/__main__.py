"""`python -m launcher` is `darts-launch`."""

from launcher.cli import main

main()
