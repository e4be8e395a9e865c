"""A tiny Llama under the Trainer, and the same training in one process in float64."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from distclip.testing import expected
from distclip.tools.launch import accelerate_cpu

LR, ROWS = 0.3, 8

logging.getLogger("transformers").setLevel(logging.ERROR)


def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=17,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )


def examples(count: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(17, (count, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, 0] = -100  # never a target; transformers 4 counts it in its mean over the tokens
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


class InOrder(Trainer):  # type: ignore[misc]
    """Takes the examples as they come."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)


class Watch(TrainerCallback):  # type: ignore[misc]
    """Keeps what a callback's policy decided in each step, and the learning rates."""

    def __init__(self, report: Any) -> None:
        self.report, self.decisions, self.rates = report, [], []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.decisions.append(repr(self.report().to_dict()))  # thresholds may be NaN
        self.rates.append(kwargs["lr_scheduler"].get_last_lr()[0])


def trainer_of(
    folder: Path,
    layout: str,
    callbacks: list[Any],
    *,
    updates: int = 4,
    count: int | None = None,
    kind: Any = InOrder,
    made: Any = None,
    **options: Any,
) -> Any:
    """Every update takes ``ROWS`` examples, whatever the number of ranks.

    ``made``: a model in place of :func:`model`'s.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    begin_anew()
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ROWS // 2 // world,
        "max_steps": updates,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 1e-9,  # would stop the training
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **layout_options(layout, options),
    }
    if layout == "ddp" and world > 1:
        given["ddp_backend"] = "gloo"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = kind(
            model=model() if made is None else made,
            args=TrainingArguments(**given),
            train_dataset=examples(count or updates * ROWS),
            callbacks=callbacks,
        )
    for quiet in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(quiet)
    return trainer


def begin_anew() -> None:
    """Forget what an earlier Trainer of this process has told Accelerate."""
    for name in [n for n in os.environ if n.startswith(("FSDP_", "ACCELERATE_"))]:
        del os.environ[name]
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerate_cpu.become_cpu_rank(cpu=True)


def layout_options(layout: str, options: dict[str, Any]) -> dict[str, Any]:
    """``options`` with those that the Trainer takes a layout by."""
    if layout == "fsdp2":
        options["fsdp"] = "full_shard"
        options["fsdp_config"] = {
            "version": 2,
            "cpu_ram_efficient_loading": False,
            "sync_module_states": False,  # transformers 4's default is true, which needs a GPU
        }
    if layout == "zero2":
        options["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_optimization": {"stage": 2},
            "optimizer": {"type": "SGD", "params": {"lr": LR}},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
            **options.get("deepspeed", {}),
        }
        if not options["deepspeed"]["optimizer"]:
            del options["deepspeed"]["optimizer"]  # the Trainer's own, and its scheduler
    return options


def train(trainer: Any, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the Trainer and of torch, about CPU
        trainer.train(**options)


def weights_of(trainer: Any) -> dict[str, Tensor]:
    if trainer.is_deepspeed_enabled:
        from tests.integrations import engines

        return engines.weights_of(trainer.model_wrapped)
    found = {}
    for name, p in trainer.model.named_parameters():
        whole = p.full_tensor() if hasattr(p, "full_tensor") else p
        found[name.removeprefix("module.")] = whole.detach().clone()
    return found


def norms_of(trainer: Any) -> list[float]:
    return [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]


def reference(policy: Any, updates: int, made: Any = None) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and norms of the same training, clipped by the float64 oracle.

    Of ``made`` as it is, or of the model in float64.
    """
    whole, norms = model().double() if made is None else made, []
    memory: dict[str, Any] = {}
    named = dict(whole.named_parameters())
    data = examples(updates * ROWS)
    for number in range(updates):
        rows = torch.stack([e["input_ids"] for e in data[number * ROWS :][:ROWS]])
        loss = whole(input_ids=rows, labels=rows).loss
        found = torch.autograd.grad(loss, list(named.values()))
        want = expected(policy, dict(zip(named, found, strict=True)), named, memory=memory)
        norms.append(float(np.sqrt(sum(float((g.double() ** 2).sum()) for g in found))))
        with torch.no_grad():
            for name, p in named.items():
                p -= LR * torch.from_numpy(np.asarray(want.gradients[name]))
    return {n: p.detach() for n, p in named.items()}, norms


@contextlib.contextmanager
def distclip_run(config: Any) -> Iterator[None]:
    """The integrations as `distclip run` installs them."""
    import accelerate.accelerator as module

    from distclip.integrations import accelerate, transformers

    names = ("prepare", "prepare_model", "prepare_optimizer")
    before = {name: getattr(module.Accelerator, name) for name in names}
    accelerate.enable(module, config)
    transformers.enable(module, config)
    try:
        yield
    finally:
        transformers._everywhere = False
        for name, method in before.items():
            setattr(module.Accelerator, name, method)
