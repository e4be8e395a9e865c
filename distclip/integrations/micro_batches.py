"""Micro-batch clipping: each micro-batch's gradient is clipped before it is accumulated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from distclip.clipper import GradClipper
from distclip.errors import ConfigurationError
from distclip.layouts import fsdp2
from distclip.policies import Policy
from distclip.policies.compose import stages
from distclip.report import ClipReport
from distclip.statistics import collectives

BUCKET = 1 << 23
"""Elements that are averaged together: as many as DDP puts into about one bucket."""


class MicroBatchClipper:
    """Clips what each backward adds to the gradients, on each rank by itself.

    ::

        micro = distclip.MicroBatchClipper(ddp_model, policies.global_norm(1.0))
        for batch in batches:                    # the micro-batches of this rank
            with micro.clip_():                  # forward and backward, without synchronisation
                (loss_of(ddp_model, batch) / len(batches)).backward()
        micro.average_()                         # over the ranks, as DDP does it
        optimizer.step()

    Where one micro-batch has a gradient much larger than the others, a clip of the sum shrinks all
    of them with it; this one bounds its share (Robust and Fast Training via Per-Sample Clipping,
    arXiv 2605.02701; micro-batch clipping, arXiv 2408.16204). The result depends on the size of the
    micro-batches, and on the number of ranks: it is no longer the clipped gradient of a batch.

    A threshold applies to what backward adds: where the loss is divided by n micro-batches, to the
    n-th part of a micro-batch's gradient. A micro-batch that the policy skips is left out of the
    sum. NaN and inf are handed on, for the clip of the sum to find.

    For plain models and DDP, where each rank has the whole gradient of its micro-batch. Under FSDP2
    (all trained parameters within ``fully_shard``) a micro-batch is that of all ranks together,
    whose gradient every backward reduces: a reduction and the all-reduce of a clip for each
    micro-batch, where accumulation alone needs one reduction an update, and the same number of
    micro-batches on every rank. FSDP1, ZeRO and tensor parallelism are refused. Takes the memory
    of one more gradient (FSDP2: of this rank's part of it) during a backward.

    Args:
        model: the model as it is called in training: the ``DistributedDataParallel`` itself.
        policy: what to do with each micro-batch's gradient; one without memory.
        process_group: the ranks to average over; that of DDP, or all ranks, by default.

    Raises:
        ConfigurationError: parameters that are sharded otherwise, or some by FSDP2 and others not;
            a DeepSpeed engine, gradients in ``main_grad``, a policy with memory.
    """

    last_report: ClipReport | None = None
    """The report of the last micro-batch of this rank."""

    def __init__(
        self, model: nn.Module, policy: Policy, *, process_group: ProcessGroup | None = None
    ) -> None:
        self._ddp = model if isinstance(model, DistributedDataParallel) else None
        if process_group is None and self._ddp is not None:
            process_group = self._ddp.process_group
        if hasattr(model, "zero_optimization_stage"):
            raise ConfigurationError(
                "MicroBatchClipper: a DeepSpeed engine takes each gradient out of .grad during "
                "backward; clip once per step by distclip.deepspeed.attach(engine)"
            )
        self._clipper = clipper = GradClipper(
            model, policy, on_nonfinite="pass", verify_replicas="never", process_group=process_group
        )
        self._parameters = fsdp2.sharded(model.parameters())
        self._in_fsdp2 = fsdp2.known_to_fsdp2(self._parameters)
        self._fsdp2 = fsdp2.modules_of(model)
        if clipper.plan.group is not None and not self._fsdp2:
            raise ConfigurationError(
                f"MicroBatchClipper: {clipper.names[0]!r} or other parameters are spread over "
                f"ranks (FSDP1, tensor, expert or pipeline parallelism), so that no rank has the "
                f"gradient of its micro-batch; clip once per step by GradClipper, or use DDP or "
                f"fully_shard"
            )
        self._refuse()
        for stage in stages(policy, clipper.parameters):
            if stage.policy.init([clipper.parameters[member] for member in stage.members]):
                raise ConfigurationError(
                    f"MicroBatchClipper: {stage.policy.name} remembers norms, which are other ones "
                    f"on each rank here; give a policy without memory, and this one to the "
                    f"GradClipper of the sum"
                )
        self._group = collectives.default_group(process_group)

    @contextlib.contextmanager
    def clip_(self, loss_scale: Tensor | None = None) -> Iterator[None]:
        """Clip what the backward in this block leaves, and add it to what was there before.

        The forward belongs into the block, since DDP decides there whether to synchronise. FSDP2 is
        told to reduce the gradients of this backward, and is left so. After an
        exception the gradients are as they were before the block. Parameters may be frozen and
        unfrozen between blocks.

        Args:
            loss_scale: 0-dim; how many times too large the gradients are, under a gradient scaler.

        Raises:
            ConfigurationError: a forward outside of the block, under DDP; an earlier backward that
                FSDP2 has not reduced; gradients in ``main_grad``.
        """
        self._refuse()
        fsdp2.reduce_in_backward(self._fsdp2)
        kept = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        added = [*kept]
        try:
            with contextlib.nullcontext() if self._ddp is None else self._ddp.no_sync():
                yield
            # What the last forward has set: True where its backward averages over the ranks.
            synced = self._ddp is not None and self._ddp.require_forward_param_sync
            if synced and any(parameter.grad is not None for parameter in self._parameters):
                raise ConfigurationError(
                    "MicroBatchClipper: the forward was made outside of `with micro.clip_():`, so "
                    "that DDP averaged this micro-batch over the ranks before it could be clipped; "
                    "move the forward into the block"
                )
            self.last_report = report = self._clipper.clip_before_step(loss_scale)
            if report.leave_out is None or not bool(report.skipped):
                added = list(map(_sum, kept, [parameter.grad for parameter in self._parameters]))
        finally:
            for parameter, gradient in zip(self._parameters, added, strict=True):
                parameter.grad = gradient

    def _refuse(self) -> None:
        """Refuse what has changed too, since parameters are frozen and unfrozen."""
        for name, parameter in self._clipper.here.items():
            if getattr(parameter, "main_grad", None) is not None:
                raise ConfigurationError(
                    f"MicroBatchClipper: {name!r} accumulates its gradients in main_grad, where a "
                    f"micro-batch's cannot be told from those before it; leave Megatron's wrapper "
                    f"out (delete main_grad), or clip once per step by GradClipper"
                )
            if self._fsdp2 and parameter.requires_grad and id(parameter) not in self._in_fsdp2:
                raise ConfigurationError(
                    f"MicroBatchClipper: {name!r} lies outside of fully_shard, which reduces the "
                    f"gradients of the others only; shard the whole model, or clip once per step "
                    f"by GradClipper"
                )
        if self._fsdp2 and fsdp2.unreduced(self._parameters):
            raise ConfigurationError(
                "MicroBatchClipper: FSDP2 has not reduced yet what an earlier backward has left, "
                "and would add it to this micro-batch; make every backward in "
                "`with micro.clip_():`, or leave set_requires_gradient_sync(False) out"
            )

    @torch.no_grad()
    def average_(self) -> None:
        """Average the gradients over the ranks, in place: once, after the last micro-batch.

        A parameter without a gradient counts as 0, and stays without where no rank has one. Sparse
        gradients become dense. One all-reduce for each 8 million elements of a dtype; reads the
        host after each. Under FSDP2 there is nothing left to do.
        """
        if self._group is None or self._fsdp2:
            return
        for bucket in _buckets([p for p in self._parameters if p.requires_grad]):
            gradients = [
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense()
                for parameter in bucket
            ]
            here = [float(parameter.grad is not None) for parameter in bucket]
            flat = torch.cat([g.flatten() for g in gradients] + [gradients[0].new_tensor(here)])
            collectives.average_later(flat, self._group).wait()
            *averaged, anywhere = torch.split(flat, [*(g.numel() for g in gradients), len(bucket)])
            flags = (anywhere != 0).tolist()
            for parameter, gradient, new, found in zip(
                bucket, gradients, averaged, flags, strict=True
            ):
                if found:
                    parameter.grad = gradient.copy_(new.view_as(gradient))


def _sum(kept: Tensor | None, added: Tensor | None) -> Tensor | None:
    """The sum of two gradients, either of which may be None; added to ``kept`` in place."""
    if kept is None or added is None:
        return added if kept is None else kept
    return kept.add_(added)


def _buckets(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one dtype and device, at most ``BUCKET`` elements or one parameter together."""
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter in parameters:
        alike.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for group in alike.values():
        bucket: list[Tensor] = []
        for parameter in group:
            if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET:
                yield bucket
                bucket = []
            bucket.append(parameter)
        yield bucket
