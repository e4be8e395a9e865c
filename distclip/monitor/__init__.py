"""What a run's clipping looked like: sinks that record it, tables and pictures that show it."""

from distclip.monitor.sinks import JsonlSink as JsonlSink
from distclip.monitor.sinks import Sink as Sink
