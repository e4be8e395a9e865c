"""Clipping policies: whole-tensor statistics in, decisions out.

There are three kinds: those that scale, those that clamp, and those that decide per unit. Every
policy is a frozen dataclass that is checked when it is built. ``chain`` puts policies one after
another, ``by_name`` side by side.

A file of one policy has an underscore: without it, the module ``policies.agc`` and the function
``policies.agc`` would be one name. The other files with an underscore are for this package only.
"""

from distclip.policies._adagc import AdaGC as AdaGC
from distclip.policies._adagc import adagc as adagc
from distclip.policies._agc import AGC as AGC
from distclip.policies._agc import agc as agc
from distclip.policies._autoclip import AutoClip as AutoClip
from distclip.policies._autoclip import autoclip as autoclip
from distclip.policies._block_rms import BlockRMS as BlockRMS
from distclip.policies._block_rms import block_rms as block_rms
from distclip.policies._dreamer_agc import DreamerAGC as DreamerAGC
from distclip.policies._dreamer_agc import dreamer_agc as dreamer_agc
from distclip.policies._expert_aware import ExpertAware as ExpertAware
from distclip.policies._expert_aware import expert_aware as expert_aware
from distclip.policies._global_norm import GlobalNorm as GlobalNorm
from distclip.policies._global_norm import global_norm as global_norm
from distclip.policies._group_ema import GroupEMA as GroupEMA
from distclip.policies._group_ema import group_ema as group_ema
from distclip.policies._group_norm import GroupNorm as GroupNorm
from distclip.policies._group_norm import group_norm as group_norm
from distclip.policies._ladder import Ladder as Ladder
from distclip.policies._ladder import ladder as ladder
from distclip.policies._measure import Measure as Measure
from distclip.policies._measure import measure as measure
from distclip.policies._muon_aware import MuonAware as MuonAware
from distclip.policies._muon_aware import muon_aware as muon_aware
from distclip.policies._norm_gate import NormGate as NormGate
from distclip.policies._norm_gate import norm_gate as norm_gate
from distclip.policies._norm_stabilizer import NormStabilizer as NormStabilizer
from distclip.policies._norm_stabilizer import norm_stabilizer as norm_stabilizer
from distclip.policies._parameter_norm import ParameterNorm as ParameterNorm
from distclip.policies._parameter_norm import parameter_norm as parameter_norm
from distclip.policies._running_max import RunningMax as RunningMax
from distclip.policies._running_max import running_max as running_max
from distclip.policies._skip_norm import SkipNorm as SkipNorm
from distclip.policies._skip_norm import skip_norm as skip_norm
from distclip.policies._skip_spikes import SkipSpikes as SkipSpikes
from distclip.policies._skip_spikes import skip_spikes as skip_spikes
from distclip.policies._value import Value as Value
from distclip.policies._value import value as value
from distclip.policies._zclip import ZClip as ZClip
from distclip.policies._zclip import zclip as zclip
from distclip.policies.checks import Limit as Limit
from distclip.policies.compose import ByName as ByName
from distclip.policies.compose import ByPart as ByPart
from distclip.policies.compose import Chain as Chain
from distclip.policies.compose import SideBySide as SideBySide
from distclip.policies.compose import by_name as by_name
from distclip.policies.compose import by_part as by_part
from distclip.policies.compose import chain as chain
from distclip.policies.protocol import Action as Action
from distclip.policies.protocol import Clamp as Clamp
from distclip.policies.protocol import ClampingPolicy as ClampingPolicy
from distclip.policies.protocol import Needs as Needs
from distclip.policies.protocol import ParameterInfo as ParameterInfo
from distclip.policies.protocol import Policy as Policy
from distclip.policies.protocol import Scale as Scale
from distclip.policies.protocol import ScalingPolicy as ScalingPolicy
from distclip.policies.protocol import Skip as Skip
from distclip.policies.protocol import State as State
from distclip.policies.protocol import Statistics as Statistics
from distclip.policies.protocol import UnitPolicy as UnitPolicy
from distclip.policies.registry import register as register
