"""The clippers of an ``Accelerator``: one for each set of parameters that is clipped by itself."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from torch import Tensor

from distclip import policies
from distclip.build import sinks_of
from distclip.clipper import GradClipper, Sink
from distclip.config import Config
from distclip.integrations.accelerate_prepared import Prepared

_logger = logging.getLogger("distclip.accelerate")


class Clippers:
    """Made when first asked for, since parameters are known late: FSDP2 replaces them.

    Attributes:
        known: those that apply the policy, by the ids of their parameters.
    """

    def __init__(self, prepared: Prepared, config: Config) -> None:
        self.known: dict[frozenset[int], GradClipper] = {}
        self._measurers: dict[frozenset[int], GradClipper] = {}
        self._logs = 0
        self._prepared = prepared
        self._config = config

    def forget(self) -> None:
        """Their models are gone."""
        self.known.clear()
        self._measurers.clear()

    def of(self, parameters: list[Tensor], *, measuring: bool = False) -> GradClipper:
        """The one of exactly these parameters, or the one that only measures them."""
        known = self._measurers if measuring else self.known
        key = frozenset(map(id, parameters))
        if key not in known:
            policy = policies.measure() if measuring else self._config.policy
            known[key] = GradClipper(
                self._prepared.named(parameters),
                policy,
                optimizer=self._prepared.groups(parameters),
                on_nonfinite="pass" if measuring else self._config.on_nonfinite,
                sinks=() if measuring else self.next_sinks(),
                norms=True if measuring else self._config.norms,
                verify_replicas="never" if measuring else self._config.verify_replicas,
            )
            if not measuring and self._prepared.accelerator.is_main_process:
                _logger.info("clipping %d parameters by %r", len(key), policy)
        return known[key]

    def next_sinks(self) -> tuple[Sink, ...]:
        """A log for each set of parameters: lines of two with the same step would clash."""
        self._logs += 1
        log = self._config.log
        if log is None or self._logs == 1:
            return sinks_of(self._config)
        path = Path(log.jsonl)
        path = path.with_name(f"{path.stem}.{self._logs}{path.suffix}")
        if self._prepared.accelerator.is_main_process:
            _logger.warning("another set of parameters is clipped; its log is %s", path)
        numbered = log.model_copy(update={"jsonl": str(path)})
        return sinks_of(dataclasses.replace(self._config, log=numbered))
