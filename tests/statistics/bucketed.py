"""Models under DDP whose gradients are measured as their buckets are reduced."""

from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from distclip import GradClipper
from tests.engine.test_matrix import build
from tests.statistics import overlapping
from tests.statistics.overlapping import TIGHT, Model, backward

AGC = {"name": "agc", "clip_factor": 0.01}


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "views": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "unused views": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    "static": {"static_graph": True},
    "static views": {"static_graph": True, "gradient_as_bucket_view": True},
}


def make(spare: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """In several buckets; ``spare`` is there for modules that may leave it out."""
    torch.manual_seed(0)
    model = Model().to(dtype)
    if not spare:
        del model.spare
    return DistributedDataParallel(model, bucket_cap_mb=0.004, **options)


def clip_and_check(clipper: GradClipper, model: Any, *args: Any, **options: Any) -> None:
    overlapping.clip_and_check(clipper, model.module, *args, **options)


def warm(model: Any, document: Any = TIGHT, spare: bool = False) -> GradClipper:
    """A clipper after one step: DDP makes its buckets anew after the first."""
    clipper = GradClipper(model, build(document), overlap=True)
    for number in range(2):
        model.zero_grad()
        backward(model, 90 + number, spare)
        clip_and_check(clipper, model, document)
    model.zero_grad()
    return clipper


def all_of(model: Any) -> int:
    return sum(1 for _ in model.parameters())
