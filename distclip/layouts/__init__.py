"""Where each parameter's pieces lie; see :func:`distclip.layouts.detect.detect`."""
