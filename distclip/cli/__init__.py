"""The command line: ``distclip`` and ``python -m distclip``. One file per command."""

from distclip.cli.app import main as main
