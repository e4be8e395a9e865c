"""A run's clipping as one HTML page that needs no network: the table first, then charts.

``data`` computes what the page shows, ``writing`` puts it into one file with the scripts beside
this one. uPlot 1.6.32 draws the charts (MIT, ``uPlot.LICENSE``; https://github.com/leeoniya/uPlot).
"""

from distclip.monitor.page.writing import html as html
from distclip.monitor.page.writing import save_page as save_page
