"""The first event of a run's journal."""

from stillhouse.tracking import StartEvent

START = StartEvent(
    attempt=1,
    command="stillhouse run configs/demo.toml",
    versions={"torch": "2.13.0", "ray": "2.60.0"},
    teacher="acme/teacher-8b",
    student="acme/student-1b",
    recipe_fingerprint="0f" * 32,
    num_chunks=8,
    num_sequences=32,
    sequence_length=64,
    num_targets=2000,
    bytes_per_token=176,
    num_draws=0,
    vocab_size=151_936,
    k=64,
    world_size=2,
    zero_stage=2,
    num_teachers=3,
    total_steps=10,
    control=True,
    time=1000.0,
)
