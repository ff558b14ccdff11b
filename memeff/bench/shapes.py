"""Problem sizes: output heads of well-known models, and a default sized to the machine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One problem: `tokens` hidden states of `features` numbers against `vocab` classes."""

    tokens: int
    features: int
    vocab: int

    def __str__(self) -> str:
        return f"{self.tokens}x{self.features}x{self.vocab}"

    @property
    def product_flops(self) -> int:
        """Floating-point operations of one matrix product, 2 N D V."""
        return 2 * self.tokens * self.features * self.vocab

    @property
    def logits(self) -> int:
        """Number of logits, N V."""
        return self.tokens * self.vocab


@dataclass(frozen=True)
class Head:
    """A model's head: hidden size, vocabulary as padded in the checkpoint, soft-cap if any."""

    features: int
    vocab: int
    softcap: float | None = None


# hidden_size, vocab_size and final_logit_softcapping of each model's published config.json.
MODELS: dict[str, Head] = {
    "gpt2": Head(768, 50257),
    "gpt2-xl": Head(1600, 50257),
    "llama-2-7b": Head(4096, 32000),
    "llama-3.2-1b": Head(2048, 128256),
    "llama-3.2-3b": Head(3072, 128256),
    "llama-3.1-8b": Head(4096, 128256),
    "llama-3.1-70b": Head(8192, 128256),
    "mistral-7b": Head(4096, 32000),
    "mistral-7b-v0.3": Head(4096, 32768),
    "mistral-nemo-12b": Head(5120, 131072),
    "phi-2": Head(2560, 51200),
    "phi-3-mini": Head(3072, 32064),
    "phi-4": Head(5120, 100352),
    "gemma-2-2b": Head(2304, 256000, softcap=30.0),
    "gemma-2-9b": Head(3584, 256000, softcap=30.0),
    "gemma-3-4b": Head(2560, 262208),
    "qwen-2.5-0.5b": Head(896, 151936),
    "qwen-2.5-7b": Head(3584, 152064),
    "qwen-3-4b": Head(2560, 151936),
    "gpt-oss-20b": Head(2880, 201088),
}

# Steps of a factor two to four in work; the default run takes the largest that its time allows.
_LADDER = (
    Shape(256, 256, 4096),
    Shape(512, 512, 8192),
    Shape(1024, 512, 16384),
    Shape(1024, 1024, 16384),
    Shape(2048, 1024, 16384),
    Shape(2048, 1024, 32768),
    Shape(4096, 1024, 32768),
    Shape(4096, 2048, 65536),
    Shape(8192, 4096, 128256),
)


def parse_shape(text: str) -> Shape:
    """`"N,D,V"` (or NxDxV) as a Shape; ValueError says what was expected."""
    parts = text.replace("x", ",").split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(
            f"shape {text!r}: expected three positive integers N,D,V (tokens, features, vocabulary)"
        )
    return Shape(*(int(part) for part in parts))


def largest_affordable(flops_per_second: float, floor_seconds: float, products: int) -> Shape:
    """The largest shape whose `products` matrix products take at most `floor_seconds`."""
    affordable = [
        s for s in _LADDER if products * s.product_flops <= floor_seconds * flops_per_second
    ]
    return affordable[-1] if affordable else _LADDER[0]


def sweep(shape: Shape, axis: str, points: int = 4) -> list[Shape]:
    """`shape` and its halvings along `axis` ("N" or "V"), smallest first; for plots."""
    shapes = []
    for power in reversed(range(points)):
        if axis == "N":
            shapes.append(Shape(max(1, shape.tokens >> power), shape.features, shape.vocab))
        else:
            shapes.append(Shape(shape.tokens, shape.features, max(1, shape.vocab >> power)))
    return shapes
