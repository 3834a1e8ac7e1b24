"""The order of tests: those of minutes begin first, each on another worker."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

LONGEST_FIRST = (
    "test_the_commands_of_the_readme_run",
    "test_the_plan_is_within_15_percent_of_what_training_takes",
    "test_runs_are_on_both_nodes_and_one_of_them_is_lost",
    "test_killed_at_random_moments_the_run_ends_equal",
    "test_a_split_team_is_one_process[True]",
    "test_a_tutorial_does_what_it_says[comparing]",
    "test_killed_in_the_middle_it_repeats_nothing_and_ends_the_same",
    "test_its_recipe_gives_the_same_weights_twice",
    "test_a_split_team_is_one_process[False]",
    "test_a_run_on_the_cpu_measures_and_is_not_repeated",
    "test_a_host_is_cut_off_in_the_middle[stays away]",
)
"""Tests of minutes begin first, so that all workers end together."""


def dealt(items: Sequence[T], names: Sequence[str], workers: int) -> list[T]:
    """Items in an order in which each worker begins with its part of the longest.

    At first, `--dist worksteal` gives every worker an equal share of consecutive items.
    """
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}
    order = sorted(range(len(items)), key=lambda number: place.get(names[number], len(place)))
    longest = sum(name in place for name in names)
    found: list[T] = []
    rest = iter(order[longest:])
    for worker in range(workers):
        size = (len(items) - len(found)) // (workers - worker)
        share = order[:longest][worker::workers]
        share += islice(rest, max(0, size - len(share)))
        found += [items[number] for number in share]
    return found
