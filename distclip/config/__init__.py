"""Typed, strict configuration; see :mod:`distclip.config.document` for what a file may say."""

from distclip.config.document import Config as Config
from distclip.config.document import Examined as Examined
from distclip.config.document import digest as digest
from distclip.config.document import examine as examine
from distclip.config.document import json_schema as json_schema
from distclip.config.document import load as load
from distclip.config.log import LogConfig as LogConfig
