"""A spec is checked once, where it is made: values that no target can have are refused by name."""

import math

import pytest

from stillhouse.errors import ConfigError
from stillhouse.logits import TargetSpec


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"k": 101}, "k is 101, but the vocabulary has 100 ids; set k between 0 and 100"),
        ({"k": -1}, "k is -1, but"),
        ({"vocab_size": 0, "k": 0}, "vocab_size is 0; set it between 1 and"),
        ({"vocab_size": 2**31}, "vocab_size is 2147483648"),
        ({"num_draws": -1}, "-1 draws are asked for; set a number between 0 and"),
        ({"num_draws": 2**31}, "2147483648 draws"),
        ({"k": 100, "num_draws": 3}, "3 draws.*k is 100.*no tail to draw from; draw none, or"),
        ({"k": 0}, "nothing of the teacher is kept; keep or draw at least one"),
        ({"value_bits": 7}, "value_bits is 7, wanted 6 or 8"),
        ({"temperature": 0.0}, "temperature is 0.0; set a finite number above 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"k": 101, "value_bits": 7}, "k is 101.*; value_bits is 7"),
    ],
)
def test_a_spec_that_no_target_has_is_refused(change: dict[str, float], complaint: str) -> None:
    values: dict[str, float] = {"vocab_size": 100, "k": 4, **change}
    with pytest.raises(ConfigError, match=complaint):
        TargetSpec(**values)  # type: ignore[arg-type]


def test_a_default_record_at_a_vocabulary_of_today_takes_99_bytes() -> None:
    assert TargetSpec(vocab_size=151_669, k=8, num_draws=40).bytes_per_token == 99
