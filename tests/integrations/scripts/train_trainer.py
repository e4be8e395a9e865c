"""A Trainer script that knows nothing of distclip; trains, and goes on from its own checkpoint.

python train_trainer.py FOLDER [DEEPSPEED_JSON]
"""

import sys
from pathlib import Path

import torch
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

FOLDER, JSON = sys.argv[1], (sys.argv[2:] or [None])[0]


class InOrder(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


def train(resume=None):
    arguments = TrainingArguments(
        output_dir=FOLDER,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=0.3,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.4,
        logging_steps=1,
        save_strategy="steps",
        save_steps=3,
        report_to="none",
        use_cpu=True,
        ddp_backend=None if JSON else "gloo",
        dataloader_pin_memory=False,
        deepspeed=JSON,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
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
    ids = torch.randint(17, (32, 9), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = InOrder(model=model, args=arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    weights = {n.removeprefix("module."): p.detach() for n, p in trainer.model.named_parameters()}
    return {
        "ranks": trainer.accelerator.num_processes,
        "weights": {name: weight.clone() for name, weight in weights.items()},
        "norms": [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line],
    }


whole = train()
resumed = train(resume=True if JSON is None else f"{FOLDER}/checkpoint-3")
if torch.distributed.get_rank() == 0:
    torch.save({"whole": whole, "resumed": resumed}, Path(FOLDER) / "result.pt")
