"""``python -m distclip.tools.simulate``: one rank of a simulated launch."""

from distclip.tools.simulate.rank import main

if __name__ == "__main__":
    main()
