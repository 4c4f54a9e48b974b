"""tools/random_teachers.py: counts of the full-size networks."""

import pytest

from tools import random_teachers

PARAMETERS = dict(
    sd15=859_520_964,
    sdxl=2_567_463_684,
    sana=1_604_462_752,
    sd3=2_028_328_000,
)


@pytest.mark.parametrize("name", PARAMETERS)
def test_counts_of_the_full_size_networks(name):
    """On the meta device: nothing is allocated."""
    entry = random_teachers.entry(name)
    network = random_teachers.network(entry, "meta")
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]
    assert entry["parameters"] == PARAMETERS[name]


def test_every_network_of_the_table_is_counted():
    assert set(random_teachers.TABLE) == set(PARAMETERS)
