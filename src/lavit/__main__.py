"""`python -m lavit`: the command line, for launchers that start modules (`torchrun -m lavit`)."""

from lavit.cli import main

main()
