"""Two models, two optimizers and an average of weights in one run: a loop that is killed goes on with all of them.

    python examples/two_models.py OUT --steps 100

After ELECTRA: a generator puts letters of its own into the text, a critic says which ones were replaced, and an
exponential moving average of the critic is what gets deployed. Masks and letters are drawn at random in each step.
"""

from __future__ import annotations

import argparse
import random
import textwrap

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lastgood

LENGTH, HIDDEN = 24, 0


class Reader(nn.Module):
    """Bytes -> as many numbers for each of them."""

    def __init__(self, numbers: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.read = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(2 * width, numbers))

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.read(self.embed(rows))[0])


def text() -> Tensor:
    """Pieces of what the standard library says of itself."""
    said = "\n".join(filter(None, (module.__doc__ for module in (argparse, random, textwrap))))
    data = torch.tensor(list(said.encode()))
    return data.unfold(0, LENGTH, 4)


def train(out: str, steps: int) -> nn.Module:
    torch.manual_seed(0)
    rows = text()
    generator, critic = Reader(256, 8), Reader(1, 16)
    average = AveragedModel(critic, multi_avg_fn=get_ema_multi_avg_fn(0.95))
    optimizer_g = torch.optim.AdamW(generator.parameters(), lr=3e-3)
    optimizer_c = torch.optim.SGD(critic.parameters(), lr=0.1, momentum=0.9)
    counts = {"letters": 0, "fooled": 0}
    with lastgood.CheckpointManager(
        out, generator=generator, critic=critic, average=average, optimizer_g=optimizer_g, optimizer_c=optimizer_c,
        counts=counts, save_steps=10, keep=lastgood.Keep(last=3),
    ) as ckpt:  # fmt: skip
        for step in range(ckpt.restore(), steps):
            batch = rows[torch.randint(len(rows), (16,))]
            hidden = torch.rand(batch.shape) < 0.2

            guesses = generator(batch.masked_fill(hidden, HIDDEN))[hidden]
            loss_g = functional.cross_entropy(guesses, batch[hidden])
            optimizer_g.zero_grad()
            loss_g.backward()
            optimizer_g.step()

            mixed = batch.clone()
            mixed[hidden] = torch.multinomial(guesses.detach().softmax(-1), 1).flatten()
            replaced = mixed != batch
            said = critic(mixed)[..., 0]
            loss_c = functional.binary_cross_entropy_with_logits(said, replaced.float())
            optimizer_c.zero_grad()
            loss_c.backward()
            optimizer_c.step()
            average.update_parameters(critic)

            counts["letters"] += int(replaced.sum())
            counts["fooled"] += int((replaced & (said < 0)).sum())
            ckpt.step(step + 1, loss=loss_g.detach() + loss_c.detach())
    print(f"{counts['fooled']} of {counts['letters']} replaced letters went unnoticed")
    return average


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args.out, args.steps)
