"""Estimates memory and hours of the paper's settings on GPUs that nobody here has measured.

    python estimate.py

    memory = 16 D + 2 F + 34 L H M               bytes
    hours  = (6 D T + 2 F P) / (0.4 R G) / 3600  for one arm; G GPUs, at most one for a group

D: trained parameters (bf16 weight and gradient, fp32 master and two moments: 16 bytes). F: frozen
parameters. L, H: layers and width of the decoder; M: tokens of a micro-batch (34 bytes of kept
activations for each layer, channel and token). T: tokens of the arm's rows; P: patches of their
images. R: dense bf16 FLOP/s of the GPU (H100: 989e12); training is
assumed to reach 0.4 of them.
The sketch costs about as much for a token as training does. Groups of equal tokens are assumed.
"""

from dataclasses import dataclass

RATE = 989e12
EFFICIENCY = 0.4


@dataclass(frozen=True)
class Setting:
    """A model, its data and the number of groups."""

    trained: float
    frozen: float
    layers: int
    width: int
    micro_tokens: int
    tokens: float
    patches: float
    groups: int
    sketched: float  # tokens

    @property
    def memory(self) -> float:
        """Bytes of one branch in training."""
        activations = 34 * self.layers * self.width * self.micro_tokens
        return 16 * self.trained + 2 * self.frozen + activations

    def hours(self, tokens: float, gpus: int) -> float:
        """Hours to train on ``tokens``."""
        patches = self.patches * tokens / self.tokens
        work = 6 * self.trained * tokens + 2 * self.frozen * patches
        return work / (EFFICIENCY * RATE * gpus) / 3600


# Vision: rows of one image of 784 tokens (3136 patches) and 100 tokens of text, an upper bound.
SETTINGS = {
    "vision_3b": Setting(
        3.09e9, 0.67e9, 36, 2048, 2 * 884, 136e3 * 884, 136e3 * 3136, 8, 136 * 200 * 884
    ),
    "vision_7b": Setting(
        7.62e9, 0.68e9, 28, 3584, 2 * 884, 1.6e6 * 884, 1.6e6 * 3136, 4, 176 * 200 * 884
    ),
    "text_3b": Setting(3.09e9, 0.0, 36, 2048, 8 * 256, 66 * 10e3 * 256, 0.0, 4, 66 * 200 * 256),
}


def rows() -> list[str]:
    """The table, in Markdown."""
    lines = [
        "| setting | groups | memory of a branch | sketch on 1 GPU | arm on 1 GPU | arm on 8 |",
        "|---|---|---|---|---|---|",
    ]
    for name, setting in SETTINGS.items():
        sketch = setting.hours(setting.sketched, 1)
        one = setting.hours(setting.tokens, 1)
        several = setting.hours(setting.tokens, min(8, setting.groups))
        cells = [f"{setting.memory / 1e9:.0f} GB", *(f"{h:.1f} h" for h in (sketch, one, several))]
        lines.append(f"| {name} | {setting.groups} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(rows()))
