"""A small GRPO loop: groups of rollouts, several optimizer steps an update, several losses a step.

One process: `python grpo.py`. Two ranks: `torchrun --nproc-per-node 2 grpo.py`.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import GradClipper, policies

VOCABULARY, LENGTH, PROMPTS, GROUP = 8, 4, 8, 8
EPOCHS, MINIBATCHES, MICROBATCHES = 2, 2, 2  # four optimizer steps an update, two backwards each


class Policy(nn.Module):
    """Logits of LENGTH answer tokens, given one prompt token."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.body = nn.Linear(16, LENGTH * 16)
        self.lm_head = nn.Linear(16, VOCABULARY)

    def forward(self, prompts):
        hidden = torch.tanh(self.body(self.embed(prompts)))
        return self.lm_head(hidden.unflatten(-1, (LENGTH, 16)))


def rollouts(model, update, rank):
    """Prompts, sampled answers, their log-probabilities and advantages; other ones on each rank."""
    random = torch.Generator().manual_seed(1000 * update + rank)
    prompts = torch.randint(VOCABULARY, (PROMPTS,), generator=random).repeat_interleave(GROUP)
    with torch.no_grad():
        logprobs = model(prompts).log_softmax(-1)
    answers = torch.multinomial(logprobs.flatten(0, 1).exp(), 1, generator=random)
    answers = answers.view(-1, LENGTH)
    wanted = (prompts[:, None] + torch.arange(LENGTH)) % VOCABULARY
    rewards = (answers == wanted).double().mean(1).view(PROMPTS, GROUP)
    centred = rewards - rewards.mean(1, keepdim=True)
    advantages = (centred / (rewards.std(1, keepdim=True) + 0.1)).flatten().float()
    chosen = logprobs.gather(-1, answers[..., None]).squeeze(-1)
    return (prompts, answers, chosen, advantages), rewards.mean().item()


def losses(model, prompts, answers, old, advantages):
    """The clipped surrogate, the divergence from the policy of the rollouts, the entropy."""
    logprobs = model(prompts).log_softmax(-1)
    chosen = logprobs.gather(-1, answers[..., None]).squeeze(-1)
    ratio, advantage = (chosen - old).exp(), advantages[:, None]
    surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    divergence = (old - chosen).exp() - (old - chosen) - 1.0
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return -surrogate.mean(), 0.01 * divergence.mean(), -0.001 * entropy.mean()


def train(model, step, updates, rank=0, spoil=lambda update, advantages: advantages):
    """Rewards of the updates, and of each optimizer step its norm and whether it was skipped."""
    rewards, norms, skipped = [], [], []
    for update in range(updates):
        (*batch, advantages), reward = rollouts(model, update, rank)
        batch.append(spoil(update, advantages))
        rewards.append(reward)
        for _ in range(EPOCHS):
            for minibatch in zip(*(each.chunk(MINIBATCHES) for each in batch), strict=True):
                for micro in zip(*(each.chunk(MICROBATCHES) for each in minibatch), strict=True):
                    (sum(losses(model, *micro)) / MICROBATCHES).backward()
                norms.append(step.optimizer_step().item())
                skipped.append(step.skipped)
                for optimizer in step.optimizers:
                    optimizer.zero_grad()
            if step.skipped:
                break  # these rollouts are not used again
    return rewards, norms, skipped


def main():
    """Train for 40 updates and print what came of it."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(0)
    model = Policy()
    if ranks > 1:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    gate = policies.norm_gate("lm_head.*", 2.0)
    policy = policies.chain(gate, policies.skip_norm(5.0, clip_norm=1.0))
    clipper = GradClipper(model, policy, on_nonfinite="skip")
    step = distclip.ClippedStep(clipper, optimizer)
    rewards, norms, skipped = train(model, step, 40, int(os.environ.get("RANK", "0")))
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"reward {rewards[0]:.2f} -> {rewards[-1]:.2f}, largest norm {max(norms):.2f}")
        print(f"{sum(skipped)} of {len(norms)} optimizer steps skipped")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
