"""What a run's clipping looked like: sinks that record it, tables and pictures that show it."""

from distclip.common.exponents import Exponents as Exponents
from distclip.monitor.noise import NoiseScale as NoiseScale
from distclip.monitor.notebook import plot as plot
from distclip.monitor.rank_noise import RankNoiseScale as RankNoiseScale
from distclip.monitor.recording import Sink as Sink
from distclip.monitor.sinks import JsonlSink as JsonlSink
from distclip.monitor.states import States as States
from distclip.monitor.trackers import AccelerateSink as AccelerateSink
from distclip.monitor.trackers import MLflowSink as MLflowSink
from distclip.monitor.trackers import TensorBoardSink as TensorBoardSink
from distclip.monitor.trackers import TrackioSink as TrackioSink
from distclip.monitor.trackers import WandbSink as WandbSink
from distclip.monitor.updates import UpdateMonitor as UpdateMonitor
from distclip.monitor.updates import UpdateReport as UpdateReport
