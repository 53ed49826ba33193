"""How each model of the zoo is made: its shape, its tokenizer, its curriculum. One frozen recipe per model."""

import math
from dataclasses import dataclass, field

_KINDS = {"place": 4.0, "met": 3.0, "two_hop": 3.0, "count": 1.0}


@dataclass(frozen=True)
class Stage:
    """A stretch of training: which worlds, how large, in batches of how many tokens.

    `copies` is the share of rows that are random tokens and their repeat, at most `max_copy` each; `copied_words` is
    the share among these that are words of the worlds, for a model whose tokens are letters, `reversed_copies` of
    those that are repeated backwards (word by word), for questions whose answer stands before what they name.
    """

    steps: int
    facts: tuple[int, int] = (1, 8)
    max_fillers: int = 0
    max_tokens: int = 1024
    questions: int = 12
    copies: float = 0.0
    copied_words: float = 0.0
    reversed_copies: float = 0.0
    max_copy: int = 16
    batch_tokens: int = 4096
    kinds: dict[str, float] = field(default_factory=lambda: dict(_KINDS))


@dataclass(frozen=True)
class Recipe:
    """`architecture` and `shape` are transformers' `model_type` and configuration.

    `look_back[layer][head]` is how many tokens back a head looks at the start; `theta` is the rotary base there;
    `residual_scale` makes what the layers add at the start smaller. `more` stages are a second round: fresh optimizers,
    and rates that rise to half and fall once more.
    """

    architecture: str
    shape: dict[str, object]
    tokenizer: str
    stages: tuple[Stage, ...]
    more: tuple[Stage, ...] = ()
    seed: int = 0
    learning_rate: float = 5e-3
    matrix_rate: float = 0.02
    theta: float = 1e4
    look_back: tuple[tuple[int, ...], ...] = ((1, 2, 3, 4),)
    warmup: int = 100
    weight_decay: float = 0.02
    context_weight: float = 0.1
    residual_scale: float = 1.0

    @property
    def rounds(self) -> tuple[tuple[Stage, ...], ...]:
        """The stages of each round."""
        return (self.stages, self.more) if self.more else (self.stages,)

    @property
    def steps(self) -> int:
        return sum(map(n_steps, self.rounds))

    def rate(self, step: int, steps: int) -> float:
        """The learning rate at a step of a round, as a share of the peak: a short rise, then half a cosine."""
        fall = 0.5 * (1 + math.cos(math.pi * step / steps))
        return min(1.0, (step + 1) / self.warmup) * max(fall, 0.02)


def n_steps(stages: tuple[Stage, ...]) -> int:
    """How many steps a round takes."""
    return sum(stage.steps for stage in stages)


_SHAPE: dict[str, object] = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}
_NEAR, _FAR = "sliding_attention", "full_attention"
_WORD_STAGES = (
    Stage(250, copies=1.0, batch_tokens=2048),
    Stage(450, facts=(1, 8), copies=0.1, max_copy=64, batch_tokens=2048),
    Stage(600, facts=(4, 16), max_fillers=20, copies=0.05, max_copy=128),
    Stage(450, facts=(4, 32), max_fillers=120, batch_tokens=6144),
)
_PHRASE_STAGES = (
    Stage(300, copies=1.0, reversed_copies=0.4, batch_tokens=2048),
    Stage(450, facts=(1, 8), copies=0.2, reversed_copies=0.6, max_copy=32, batch_tokens=2048),
    Stage(500, facts=(4, 16), max_fillers=40, copies=0.1, reversed_copies=0.6, max_copy=64),
    Stage(300, facts=(4, 32), max_fillers=200, batch_tokens=6144),
)
_DRILLS = {"pair": 2.0, "owner": 2.0}
_BYTE_KINDS = {"place": 5.0, "met": 4.0, "two_hop": 0.5, "count": 0.5}
_BYTE_STAGES = (
    Stage(150, copies=1.0, batch_tokens=2048),
    Stage(300, copies=1.0, copied_words=0.9, reversed_copies=0.5, max_copy=64, batch_tokens=2048),
    Stage(
        300,
        facts=(2, 8),
        questions=16,
        copies=0.2,
        copied_words=1.0,
        reversed_copies=0.6,
        max_copy=64,
        batch_tokens=2560,
        kinds=_DRILLS,
    ),
    Stage(
        500,
        facts=(2, 8),
        questions=16,
        copies=0.05,
        copied_words=1.0,
        reversed_copies=0.5,
        max_copy=64,
        batch_tokens=3072,
        kinds=_BYTE_KINDS,
    ),
    Stage(200, facts=(4, 16), max_fillers=8, kinds=_BYTE_KINDS),
    Stage(200, facts=(4, 32), max_fillers=40, kinds=_BYTE_KINDS, batch_tokens=6144),
)
_MORE_BYTE_KINDS = {"place": 4.0, "met": 7.0, "two_hop": 0.25, "count": 0.25}
_MORE_BYTE_STAGES = (Stage(600, facts=(2, 32), max_fillers=40, kinds=_MORE_BYTE_KINDS),)

RECIPES: dict[str, Recipe] = {
    "llama": Recipe(
        "llama",
        {**_SHAPE, "num_hidden_layers": 4, "rope_theta": 1e4},
        "words",
        _WORD_STAGES,
        look_back=((1, 2, 3, 4), (5, 6)),
    ),
    "qwen3": Recipe(
        "qwen3",
        {**_SHAPE, "num_hidden_layers": 4, "head_dim": 32, "rope_theta": 1e5},
        "words",
        _WORD_STAGES,
        seed=1,
        theta=1e5,
    ),
    "gemma3": Recipe(
        "gemma3_text",
        {
            **_SHAPE,
            "num_hidden_layers": 4,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 64,
            "layer_types": [_NEAR, _FAR, _FAR, _FAR],
        },
        "phrases",
        _PHRASE_STAGES,
        seed=2,
        residual_scale=0.2,
    ),
    "qwen2": Recipe(
        "qwen2",
        {**_SHAPE, "num_hidden_layers": 5, "head_dim": 32, "rope_theta": 1e4},
        "bytes",
        _BYTE_STAGES,
        more=_MORE_BYTE_STAGES,
        seed=3,
        residual_scale=0.2,
        look_back=((1, 2, 3, 4), (4, 5, 6, 8), (8, 10, 12, 9)),
    ),
}
