"""What follows a clipper's steps and goes into its checkpoints, beside the policy's memory.

It is text within the state's ``policy``: a key of its own would not load where
``torch.distributed.checkpoint`` loads into a state without it. An older distclip leaves it out.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from distclip.common.foreign import in_one_line
from distclip.engine.checkpoint_form import VERSION, checksum
from distclip.errors import ConfigurationError, StateError

_logger = logging.getLogger("distclip")


@runtime_checkable
class Follower(Protocol):
    """A sink of a clipper that has averages of its own.

    Attributes:
        kept_as: its name in the checkpoint.
    """

    kept_as: str

    def state_dict(self) -> dict[str, Any]:
        """Plain values that JSON has; the same on every rank."""

    def load_state_dict(self, state: Any) -> None:
        """Raises a StateError for one that does not fit, and changes nothing then."""


def checked_sinks(sinks: object) -> tuple[Any, ...]:
    """One sink, or several, as a tuple.

    Raises:
        ConfigurationError: one of them cannot be called.
    """
    several = isinstance(sinks, Iterable) and not callable(sinks) and not isinstance(sinks, str)
    given = tuple(sinks) if several else (sinks,)  # type: ignore[arg-type]
    for each in given:
        if not callable(each):
            raise ConfigurationError(
                f"sinks: expected callables sink(step, report), such as "
                f"monitor.JsonlSink('clip.jsonl'), got {each!r}"
            )
    return given


def with_followers(state: dict[str, object], sinks: Iterable[object]) -> dict[str, object]:
    """A clipper's state with those of the followers among its sinks."""
    kept = {each.kept_as: each.state_dict() for each in sinks if isinstance(each, Follower)}
    if not kept:
        return state
    policy = json.loads(str(state["policy"]))
    result = {**state, "policy": json.dumps({**policy, "followers": kept})}
    return {**result, "version": [VERSION, checksum(result)]}


def loading(state: object, sinks: Iterable[object], load: Callable[[], None]) -> Callable[[], None]:
    """``load``, and then the state of each follower that a checked state has.

    What does not fit (other parameters, another distclip) is no reason not to resume: the averages
    begin anew, and a line in the log says so.
    """

    def loads() -> None:
        load()
        kept = _saved_followers(state)
        for each in sinks:
            if isinstance(each, Follower) and each.kept_as in kept:
                try:
                    each.load_state_dict(kept[each.kept_as])
                except StateError as error:
                    _logger.warning("the averages begin anew: %s", in_one_line(error, 300))

    return loads


def _saved_followers(state: object) -> Mapping[str, Any]:
    if not isinstance(state, Mapping) or not isinstance(state.get("version"), list):
        return {}
    kept = json.loads(state["policy"]).get("followers", {})
    return kept if isinstance(kept, Mapping) else {}
