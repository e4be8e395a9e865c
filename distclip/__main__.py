"""``python -m distclip``."""

from distclip.cli import main

if __name__ == "__main__":
    main()
