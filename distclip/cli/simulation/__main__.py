"""``python -m distclip.cli.simulation``: one rank of a simulated launch."""

from distclip.cli.simulation.rank import main

if __name__ == "__main__":
    main()
