"""`python -m pico_edge` is the `pico-edge` command."""

from pico_edge.cli import main

main()
