pytest_plugins = ["distclip.testing.plugin", "pytester"]
