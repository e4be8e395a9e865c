"""The sharded models of ``distclip.testing``, which ``distclip verify`` runs too."""

from distclip.testing.models.sharded import *  # noqa: F403
from distclip.testing.models.sharding import shard as shard
