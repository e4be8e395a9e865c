"""Variables of the environment that several parts of distclip read."""

CONFIG_VARIABLE = "DISTCLIP_CONFIG"
"""Names the configuration of a run, for the processes of it too."""
