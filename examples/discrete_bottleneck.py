"""A discrete bottleneck: an autoencoder of letters whose every fourth position becomes a code of bits.

    python examples/discrete_bottleneck.py

The text is words of four letters out of a small lexicon. The encoder makes one vector of logits out of four letters,
``SemHashGate`` turns it into bits, and the decoder has to tell the letters from these bits alone. In training some
codes are soft and all have noise; in evaluation they are bits, so that a word has one number.

Source: Kaiser and Bengio, Discrete Autoencoders for Sequence Models, 2018 (Improved SemHash); without its language
model.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dsts_kernels import SemHashGate
from examples.small import at_least_1, parser, report

LETTERS, WORD, WORDS = 26, 4, 32  # the alphabet, letters of a word, words of the lexicon


class Autoencoder(nn.Module):
    """Letters ``(B, L)`` to logits of letters ``(B, L, 26)`` and codes ``(B, L / 4, bits)``."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(LETTERS, 16)
        self.encoder = nn.Sequential(nn.Linear(WORD * 16, 64), nn.ReLU(), nn.Linear(64, bits))
        self.gate = SemHashGate(bits, sample_dims=2)  # each code of a text is hard or soft as a whole
        self.decoder = nn.Sequential(nn.Linear(bits, 64), nn.ReLU(), nn.Linear(64, WORD * LETTERS))

    def forward(self, letters: Tensor) -> tuple[Tensor, Tensor]:
        four = self.embedding(letters).unflatten(1, (-1, WORD)).flatten(2)  # (B, L / 4, 4 * 16)
        codes = self.gate(self.encoder(four))
        return self.decoder(codes).unflatten(2, (WORD, LETTERS)).flatten(1, 2), codes


def main(arguments: list[str] | None = None) -> list[float]:
    this = parser(__doc__, steps=300)
    this.add_argument("--bits", type=at_least_1, default=8, help="of a code")
    options = this.parse_args(arguments)
    torch.manual_seed(options.seed)
    lexicon = torch.randint(LETTERS, (WORDS, WORD), device=options.device)

    def texts(count: int) -> Tensor:
        """Letters ``(count, 32)`` of texts of eight words."""
        return lexicon[torch.randint(WORDS, (count, 8), device=options.device)].flatten(1)

    model, losses = Autoencoder(options.bits).to(options.device), []
    optimizer = torch.optim.AdamW(model.parameters(), options.rate)
    for _ in range(options.steps):
        letters = texts(16)
        logits, _ = model(letters)
        loss = F.cross_entropy(logits.flatten(0, 1), letters.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        logits, _ = model(letters := texts(64))
        _, codes = model(lexicon)  # (32, 1, bits) of 0 and 1
    right = (logits.argmax(2) == letters).float().mean()
    count = len(codes.flatten(1).unique(dim=0))
    print(f"{right:.1%} of the letters come back from bits; {WORDS} words have {count} codes of {options.bits} bits")
    return report(losses)


if __name__ == "__main__":
    main()
