"""How large the parts of a GPU session are: real sizes, and tiny ones for a dry run on a CPU.

Shapes: T tokens, V vocabulary, H hidden, L positions of a row.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TeacherShape:
    """A model of Qwen3's architecture with random weights."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Scale:
    """What every part is given. Ratios are judged at the real sizes alone."""

    device: str
    vocab_size: int  # odd, as Qwen3's is when its head is cut to the highest id of its tokenizer
    wide_vocab_size: int  # the whole head: a multiple of 64
    check_tokens: int
    check_hidden_size: int
    ks: tuple[int, ...]  # exact entries, most wanted first
    k: int  # of the usual measurement
    default_entries: int  # of the default target
    default_draws: int
    time_tokens: int
    # hidden size; share of the matrix product's speed
    hidden_promises: tuple[tuple[int, float], ...]
    repeats: int
    teacher: TeacherShape
    teacher_dtype: str
    length_promises: tuple[tuple[int, int, float], ...]  # rows, L; share of the GPU's peak
    num_steps: int  # of the live run
    is_real: bool

    @property
    def row_width(self) -> int:
        """Logits from one row to the next where rows are whole cache lines."""
        return -(-self.vocab_size // 64) * 64

    def promise(self, bound: float) -> float | None:
        """A bound on a ratio of times, where the sizes are those that it is promised at."""
        return bound if self.is_real else None


REAL = Scale(
    device="cuda",
    vocab_size=151_669,
    wide_vocab_size=151_936,
    check_tokens=32,
    check_hidden_size=1024,
    ks=(8, 64, 32, 128, 512),
    k=64,
    default_entries=8,
    default_draws=40,
    time_tokens=8192,
    hidden_promises=((4096, 0.86), (2048, 0.78)),
    repeats=5,
    teacher=TeacherShape(36, 4096, 12_288, 32, 8, 128),  # Qwen3-8B
    teacher_dtype="bfloat16",
    length_promises=((4, 2048, 0.45), (1, 8192, 0.42), (1, 32_768, 0.38)),
    num_steps=20,
    is_real=True,
)
TINY = Scale(
    device="cpu",
    vocab_size=1003,
    wide_vocab_size=1024,
    check_tokens=2,
    check_hidden_size=16,
    ks=(3,),
    k=4,
    default_entries=3,
    default_draws=2,
    time_tokens=8,
    hidden_promises=((16, 0.86),),
    repeats=1,
    teacher=TeacherShape(2, 64, 128, 4, 2, 16),
    teacher_dtype="float32",
    length_promises=((2, 64, 0.45),),
    num_steps=2,
    is_real=False,
)
