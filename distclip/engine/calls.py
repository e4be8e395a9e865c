"""Sessions of functions without memory: opened for a call, and kept for the next one like it.

Such a function knows no names and keeps no state. Its session is opened once for the same
parameters, and found again as long as neither they nor their sharding have changed. Between calls a
kept session holds no parameter and no gradient.
"""

from __future__ import annotations

import contextlib
import operator
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from distclip.engine import handshake
from distclip.engine.given import Fingerprint, Given
from distclip.engine.opening import group_of, open_call
from distclip.engine.passes import check_needed_weights
from distclip.engine.session import Session
from distclip.errors import DistclipError
from distclip.kernels.look import PLAIN, Look, look
from distclip.layouts import names as naming
from distclip.layouts import tensors
from distclip.layouts.detect import describe, describe_tensor, detect
from distclip.layouts.fetching import Fetched
from distclip.layouts.names import Named
from distclip.layouts.piece import Described, Entry, Hold
from distclip.options import Options
from distclip.policies import AGC, Policy
from distclip.statistics import collectives

KEPT = 16
"""Sessions that are kept."""


# ---- sessions that are kept ---------------------------------------------------------------------


class Kept:
    """A session between two calls, in which it holds no parameter; a context manager of each call.

    Args:
        key: by which it is found again.
        session: of the call.
        fingerprint: what is compared of its parameters; None where the key has all of it.
        holds: where the session looks for its parameters.
        places: which of the parameters that are meant belongs to each hold.
    """

    def __init__(
        self,
        key: Hashable,
        session: Session,
        fingerprint: Fingerprint | None,
        holds: Sequence[Hold] = (),
        places: Sequence[int] = (),
    ) -> None:
        self._key, self.session, self.fingerprint = key, session, fingerprint
        self._places = places
        self._straight = list(places) == list(range(len(places)))
        self._row: list[Tensor | None] = [hold() for hold in holds]
        self._empty = [None] * len(holds)
        for place, hold in enumerate(holds):
            hold.move(self._row, place)
        self._released = False

    def bind(self, parameters: Sequence[Tensor]) -> None:
        """Give the session the parameters of this call."""
        if self._straight and len(parameters) == len(self._row):
            self._row[:] = parameters
        else:
            self._row[:] = [parameters[place] for place in self._places]

    def __enter__(self) -> Session:
        if self.session.plan.group is not None:
            collectives.check_open(self.session.plan.group)
        return self.session

    def __exit__(self, *_: object) -> None:
        """Take the parameters from the session again, and keep it."""
        self._row[:] = self._empty
        if not self._released:  # whatever else the pieces hold: nothing binds that anew
            self.session.plan.release()
            self._released = True
        self.session.fetched = None
        if self.fingerprint is _NEVER:
            return
        _kept[self._key] = self
        while len(_kept) > KEPT:
            with contextlib.suppress(KeyError):  # another thread has let go of it
                _kept.popitem(last=False)


_kept: OrderedDict[Hashable, Kept] = OrderedDict()
"""Key (call and parameters) -> session. A session in use is not in here: two threads, or a call
within a call, never have the same."""


def forget() -> None:
    """Forget all sessions that are kept."""
    _kept.clear()


@contextlib.contextmanager
def on_parameters(given: Given, policy: Policy, *, norms: bool = True) -> Iterator[Session]:
    """A session for the gradients of parameters, for as long as the ``with`` block.

    Raises:
        UnsupportedGradientError: a sharding that cannot be read.
        RankMismatchError: the ranks call with different parameters; on all of them.
    """
    ids = np.fromiter(map(id, given.parameters), np.int64, len(given.parameters)).tobytes()
    key = (ids, given.names, policy, norms, id(_world()))
    kept = _kept.pop(key, None)
    if kept is None or not _fits(kept, given.parameters):
        kept = _opened(key, given, policy, norms=norms)
    with kept as session:
        yield session


@contextlib.contextmanager
def on_tensors(given: Sequence[Tensor], policy: Policy) -> Iterator[Session]:
    """A session that measures tensors themselves, for as long as the ``with`` block.

    It is found again by what such tensors are (shapes, dtypes, sharding), and not by which: those
    of a call are new ones at every step.
    """
    alike = _alike(given)
    key: Hashable = None if alike is None else (alike.key, policy, id(_world()))
    kept = None if key is None else _kept.pop(key, None)
    if kept is None or alike is None:
        described = [describe_tensor(str(place), tensor) for place, tensor in enumerate(given)]
        session = _session(described, policy, device_of(given), norms=True)
        session.program.scratch.only_measures = True
        _agree(session)
        pieces = session.plan.pieces
        same = alike is not None and len(pieces) == len(given)
        kept = Kept(key, session, None if same else _NEVER)
    else:
        seen = kept.session.program.scratch.known(alike.seen)
        kept.session.fetched = Fetched(seen.tensors, seen)
    with kept as session:
        yield session


def _world() -> object:
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def device_of(given: Sequence[Tensor]) -> torch.device:
    """Where the statistics go; what lies nowhere (meta) is refused when it is measured."""
    return given[0].device if given and not given[0].is_meta else torch.device("cpu")


# ---- opening one --------------------------------------------------------------------------------


def _session(
    described: Sequence[Described], policy: Policy, device: torch.device, *, norms: bool
) -> Session:
    options = Options(policy, "pass", norms=norms, verify_replicas="never", fold=False)
    return Session(open_call(described, options, device), naming.Watched([]))


def _opened(key: Hashable, given: Given, policy: Policy, *, norms: bool) -> Kept:
    """A session for these parameters, on which the ranks have agreed."""
    named = given.checked()
    meant = [parameter for _, parameter in named]
    try:
        logical, described = describe(named)
        check_needed_weights(policy, described)
        session = _session(described, policy, device_of(meant), norms=norms)
    except DistclipError as error:
        _tell(error, named, policy, norms=norms)
        raise
    if norms or session.plan.replicated:  # else the call talks to nobody
        _agree(session)
    place = {id(parameter): number for number, parameter in enumerate(meant)}
    holds: dict[int, tuple[Hold, int]] = {}
    for (_, parameter), (_, pieces) in zip(logical, described, strict=True):
        for piece in pieces:
            if piece.hold is None:
                return Kept(key, session, _NEVER)
            if isinstance(piece.hold, Hold):
                holds[id(piece.hold)] = piece.hold, place[id(parameter)]
    fingerprint = Fingerprint(given.parameters, meant)
    return Kept(key, session, fingerprint, *map(list, zip(*holds.values(), strict=True)))


def _agree(session: Session) -> None:
    """Compare the calls of all ranks of the group, unless they have agreed on this one before."""
    plan = session.plan
    if plan.group is not None:
        habits = handshake.agreements.agree(plan.group, _call(session), plan.entries)
        session.program.scratch.habits = habits


def _call(session: Session) -> str:
    policy = session.policy
    unit = f" unit={policy.unit!r}" if isinstance(policy, AGC) else ""
    return f"{policy.name} p={session.program.shown:g}{unit}"


def _tell(error: DistclipError, named: Named, policy: Policy, *, norms: bool) -> None:
    """Tell the ranks that wait for this one what is wrong with its parameters.

    They are about to compare if they have not agreed on such a call before, else to reduce: so does
    this rank, with nothing in the place of what it cannot read.
    """
    described: list[Described] = []
    for name, parameter in named:
        try:
            described += detect(name, parameter)
        except DistclipError:
            dtype = str(parameter.dtype).removeprefix("torch.")
            shaped = not (isinstance(parameter, UninitializedParameter) or parameter.is_nested)
            shape = tuple(parameter.shape) if shaped else ()
            described.append((Entry(name, shape, dtype), ()))
    with contextlib.suppress(DistclipError):
        if group_of([entry for entry, _ in described]) is None:
            return
        session = _session(described, policy, device_of([p for _, p in named]), norms=norms)
        plan = session.plan
        if plan.group is None or not (norms or plan.replicated):
            return
        if handshake.agreements.knows(plan.group, _call(session), plan.entries):
            _agree(session)  # about what to begin with
            session.clip("pass", None, trouble=error)
        else:
            handshake.tell_trouble(error, plan.group, _call(session))


# ---- finding one again --------------------------------------------------------------------------


class _Alike(NamedTuple):
    """What tensors have in common with others for which the same session does."""

    key: Hashable
    seen: Look


def _alike(given: Sequence[Tensor]) -> _Alike | None:
    """None where they are unusual: no session for them is kept."""
    specs: tuple[object, ...] | None = None
    here = given
    if not set(map(type, given)) <= PLAIN:
        specs = tuple(map(tensors.sharding_of, given))
        here = list(map(tensors.own, given))
        if any(map(tensors.is_partial, given)):
            return None
    seen = look(here)
    if seen is None:
        return None
    key = (tuple(map(_shape, given)), tuple(seen.kinds.dtypes), specs, given[0].device)
    return _Alike(key, seen)


def _fits(kept: Kept, parameters: Sequence[Tensor]) -> bool:
    """Whether a session is right for these parameters, which have the ids that it was kept for.

    If so, it has them now; and their gradients where they had to be looked at.
    """
    fingerprint, session = kept.fingerprint, kept.session
    if fingerprint is None or not fingerprint.is_of(parameters):
        return False
    meant = fingerprint.meant(parameters)
    if meant is None:
        return False
    kept.bind(meant)
    session.fetched = fingerprint.gradients(session.program, parameters)
    if session.fetched is None and not fingerprint.fits(meant):
        session.plan.release()
        return False
    return True


_shape = operator.attrgetter("shape")
_NEVER = Fingerprint((), ())
"""The key of a session that is not kept."""
