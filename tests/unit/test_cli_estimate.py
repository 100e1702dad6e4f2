"""The estimate of hours is the arithmetic that it says it is."""

import pytest

from stillhouse.cli.estimate import card_of, scoring_hours, smallest_card, training_hours


def test_a_billion_tokens_of_a_32b_teacher_take_16_h100s_about_three_hours() -> None:
    hours = scoring_hours(32.8e9, 1e9, card="H100", num_cards=16)
    assert hours == pytest.approx(2 * 32.8e9 * 1e9 / (0.4 * 989e12 * 16) / 3600)
    assert 2.5 < hours < 3.5


def test_recomputing_activations_costs_a_third_more() -> None:
    plain, again = (
        training_hours(4e9, 1e9, checkpointing=checkpointing, card="H100", num_cards=8)
        for checkpointing in (False, True)
    )
    assert again / plain == pytest.approx(8 / 6)


def test_the_slowest_card_that_the_cluster_names_counts() -> None:
    assert card_of({"CPU": 8.0, "GPU": 2.0}) is None
    assert card_of({"accelerator_type:H100": 1.0, "accelerator_type:A100-40G": 1.0}) == "A100"
    assert card_of({"accelerator_type:L40S": 1.0}) == "L40S"
    assert card_of({"accelerator_type:TPU-V6E": 1.0}) is None


def test_the_card_with_the_least_memory_that_the_cluster_names_counts() -> None:
    assert smallest_card({"CPU": 8.0, "accelerator_type:TPU-V6E": 1.0}) is None
    assert smallest_card({"accelerator_type:H100": 1.0, "accelerator_type:L4": 1.0}) == "L4"
    assert smallest_card({"accelerator_type:A100-80G": 1.0}) == "A100-80G"
    assert smallest_card({"accelerator_type:A100-40G": 1.0}) == "A100"
