"""Decoders of LLaMA's shape with random weights, and the keys, values and queries that go to their
attention instead of the model's own.

Random weights attend to everything alike, which no model does. So attention gets planted rows, as
kvbench's decode_e2e does (tests/bench/layer_data.h): one token in fifty is hot, queries find .97 of
their mass there. The model's own projections and rotations are computed all the same, and attention
waits for them: a GPU runs the kernels of a stream in order, and the planted rows are put in place
by one behind them.
"""

import math
from dataclasses import dataclass

import torch

HOT_EVERY = 50
HOT_NATS = 8.0
QUERY_DEVIATION = 0.2
MADE_TOKENS_MAX = 16384
SHIFT_TOKENS = 1111


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    name: str
    hidden: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int

    @property
    def row_elements(self):
        """Elements of q, k and v of one token together."""
        return (self.query_heads + 2 * self.kv_heads) * self.head_dim

    @property
    def layer_token_bytes(self):
        """Of k and v of one token in one layer, in bf16."""
        return 4 * self.kv_heads * self.head_dim

    @property
    def scale(self):
        return 1.0 / math.sqrt(self.head_dim)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama2-7b", 4096, 32, 32, 32, 128, 11008, 32000),
        Shape("llama3-8b", 4096, 32, 32, 8, 128, 14336, 128256),
        # For tests.
        Shape("tiny", 128, 6, 4, 2, 64, 256, 256),
    )
}


class Planted:
    """Rows of one layer; all layers of all loops get the same. Sequence b's token t is made token
    t + b * SHIFT_TOKENS, modulo their number."""

    def __init__(self, shape, prompt_tokens, device):
        self.shape = shape
        self._random = torch.Generator(device).manual_seed(1)
        made = min(prompt_tokens, MADE_TOKENS_MAX)
        rows = (made, shape.kv_heads, shape.head_dim)
        self._directions = self._units((shape.kv_heads, shape.head_dim))
        keys = self._normal(rows)
        for head in range(shape.kv_heads):
            hot = torch.randperm(made, generator=self._random, device=device)[: made // HOT_EVERY]
            keys[hot, head] += HOT_NATS * self._directions[head]
        self.keys = keys.bfloat16()
        self.values = self._normal(rows).bfloat16()

    def _normal(self, extents):
        device = self._random.device
        return torch.randn(extents, generator=self._random, device=device)

    def _units(self, extents):
        return torch.nn.functional.normalize(self._normal(extents), dim=-1)

    def places(self, sequence, first, count):
        """Which made tokens a sequence's tokens [first, first + count) are."""
        tokens = torch.arange(first, first + count, device=self.keys.device)
        return (tokens + sequence * SHIFT_TOKENS) % len(self.keys)

    def queries(self, batch):
        """[batch, query heads, head_dim], new ones every time."""
        shape = self.shape
        group = shape.query_heads // shape.kv_heads
        own = self._units((batch, shape.query_heads, shape.head_dim))
        directions = self._directions.repeat_interleave(group, 0)
        return ((directions + QUERY_DEVIATION * own) / shape.scale).bfloat16()

    def steps(self, batch, prompt_tokens, count):
        """q, k and v of new tokens, flat: [count, batch * row_elements], all q before all k."""
        rows = []
        for step in range(count):
            parts = [self.queries(batch)]
            for made in (self.keys, self.values):
                places = [self.places(b, prompt_tokens + step, 1) for b in range(batch)]
                parts.append(made[torch.cat(places)])
            rows.append(torch.cat([part.flatten() for part in parts]))
        return torch.stack(rows)


def part_of_steps(steps, shape, batch, rows):
    """The same for a slice of the batch's sequences."""
    sizes = [batch * heads * shape.head_dim
             for heads in (shape.query_heads, shape.kv_heads, shape.kv_heads)]
    parts = [part.view(len(steps), batch, -1)[:, rows].flatten(1)
             for part in steps.split(sizes, dim=1)]
    return torch.cat(parts, dim=1).contiguous()


class Weights:
    """Random ones, in bf16, of a model's first layers and of its ends."""

    def __init__(self, shape, layer_count, device):
        def random(*extents):
            return torch.empty(extents, device=device, dtype=torch.bfloat16).normal_(0.0, 0.02)

        def ones():
            return torch.ones(shape.hidden, device=device, dtype=torch.bfloat16)

        self.shape = shape
        self.embedding = random(shape.vocabulary, shape.hidden)
        self.head = random(shape.vocabulary, shape.hidden)
        self.norm = ones()
        self.layers = [
            {
                "attention_norm": ones(),
                "qkv": random(shape.row_elements, shape.hidden),
                "o": random(shape.hidden, shape.query_heads * shape.head_dim),
                "mlp_norm": ones(),
                "gate_up": random(2 * shape.inner, shape.hidden),
                "down": random(shape.hidden, shape.inner),
            }
            for _ in range(layer_count)
        ]


class Decoder:
    """One token of a batch on its way through the layers, in memory that stays where it is, as
    graphs need it. Its parts are called in order: begin, then for every layer before_attention and
    after_attention, then end."""

    def __init__(self, weights, steps, batch):
        """`steps` as Planted.steps makes them for this batch."""
        shape, device = weights.shape, steps.device
        self.shape, self.batch = shape, batch
        self._weights, self._steps = weights, steps
        self._x = torch.zeros(batch, shape.hidden, device=device, dtype=torch.bfloat16)
        self.token = torch.zeros(batch, device=device, dtype=torch.int64)
        self.step = torch.zeros(1, device=device, dtype=torch.int64)
        self.row = torch.zeros_like(steps[:1])
        queries, keys = (batch * heads * shape.head_dim
                         for heads in (shape.query_heads, shape.kv_heads))
        q, k, v = self.row[0].split([queries, keys, keys])
        self.q = q.view(batch, shape.query_heads, shape.head_dim)
        self.k, self.v = (part.view(batch, shape.kv_heads, shape.head_dim) for part in (k, v))
        self.out = torch.zeros_like(self.q)
        angles = torch.arange(len(steps), device=device)[:, None] * torch.logspace(
            0, -4, shape.head_dim // 2, device=device)
        self._cosines = torch.cat([angles.cos(), angles.cos()], -1).bfloat16()
        self._sines = torch.cat([-angles.sin(), angles.sin()], -1).bfloat16()
        self._cosine, self._sine = (torch.zeros_like(table[:1])
                                    for table in (self._cosines, self._sines))

    def reset(self):
        """Back to the first step."""
        self.step.zero_()
        self.token.zero_()

    def begin(self):
        torch.index_select(self._weights.embedding, 0, self.token, out=self._x)
        torch.index_select(self._cosines, 0, self.step, out=self._cosine)
        torch.index_select(self._sines, 0, self.step, out=self._sine)

    def before_attention(self, layer):
        """Computes the model's q, k and v, and then puts the planted ones into q, k and v."""
        shape, own = self.shape, self._weights.layers[layer]
        qkv = self._norm(own["attention_norm"]) @ own["qkv"].t()
        rotated = qkv[:, : -shape.kv_heads * shape.head_dim]
        rotated = rotated.unflatten(1, (-1, shape.head_dim))
        other_half = rotated.roll(shape.head_dim // 2, -1)
        torch.addcmul(rotated * self._cosine, other_half, self._sine)
        torch.index_select(self._steps, 0, self.step, out=self.row)

    def after_attention(self, layer, out):
        own = self._weights.layers[layer]
        self._x.addmm_(out.reshape(self.batch, -1), own["o"].t())
        gate, up = (self._norm(own["mlp_norm"]) @ own["gate_up"].t()).chunk(2, -1)
        self._x.addmm_(torch.nn.functional.silu(gate) * up, own["down"].t())

    def end(self):
        """Chooses the next token."""
        logits = self._norm(self._weights.norm) @ self._weights.head.t()
        torch.argmax(logits, -1, out=self.token)
        self.step.add_(1)

    def _norm(self, weight):
        return torch.nn.functional.rms_norm(self._x, (self.shape.hidden,), weight, 1e-5)


def exact_attention(q, k, v, scale):
    """Of one sequence in float64: outputs [query heads, head_dim] and natural logs of the sums
    [query heads], of q [query heads, head_dim] and k, v [tokens, KV heads, head_dim]."""
    kv_heads, head_dim = k.shape[1:]
    grouped = q.double().view(kv_heads, -1, head_dim)
    keys, values = (x.double().permute(1, 0, 2) for x in (k, v))
    logits = grouped @ keys.transpose(1, 2) * scale
    out = logits.softmax(-1) @ values
    return out.flatten(0, 1), logits.logsumexp(-1).flatten()
