"""The list of heads that a benchmark makes up, or reads and rounds."""

import numpy as np

from benchmarks.heads import STAND_IN, stand_in, write_list
from qvg_jax.reading.head_lists import read_head_list


def test_the_stand_in_has_the_published_share_in_every_layer(tmp_path):
    table = stand_in(30, 12)
    assert (~table).sum() == 134 and set(table.sum(1)) == {7, 8}
    np.testing.assert_array_equal(table, stand_in(30, 12))
    sizes = dict(layers=30, heads=12)
    file = write_list(STAND_IN, tmp_path, **sizes, multiple=1)
    np.testing.assert_array_equal(read_head_list(file).table, table)
    rounded = read_head_list(write_list(str(file), tmp_path, **sizes, multiple=4)).table
    assert set(rounded.sum(1)) == {8} and (rounded >= table).all()
