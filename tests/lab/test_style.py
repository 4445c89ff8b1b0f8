"""The colours of rules differ, to colour-blind eyes too."""

import itertools

import numpy as np
import pytest

from forwax.lab.style import PALETTE

RULES = list(PALETTE)[: list(PALETTE).index("value")]
SEEN = {
    "all colours": np.eye(3),
    "no red": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "no green": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "no blue": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
"""Linear RGB as it is seen: Machado, Oliveira and Fernandes 2009, severity 1."""
TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


def lab(colour, seen):
    """CIELAB of a colour such as "#2b3a67"."""
    rgb = np.array(list(bytes.fromhex(colour[1:]))) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(np.array(seen) @ linear, 0, 1) / TO_XYZ.sum(axis=1)
    bent = xyz / (3 * (6 / 29) ** 2) + 4 / 29
    x, y, z = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), bent)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
def test_two_rules_never_look_alike(seen):
    assert {"exact", "finite-difference", "learned-feedback"} <= {*RULES}
    for one, other in itertools.combinations(RULES, 2):
        apart = np.linalg.norm(lab(PALETTE[one], seen) - lab(PALETTE[other], seen))
        assert apart > 12, (one, other, apart)
