"""Levels of the trellis codes: what every content of the 8-bit register stands for.

Trained as scalar grids are, by Lloyd's alternation, with Viterbi's path in place of the nearest level:
2,048 tokens of 128 standard normal values drawn anew 40 times; their cheapest paths; then every
level the mean of the values that chose it. It starts from the quantiles of the normal density in
random order (`numpy.random.default_rng(k)`). Stored as whole multiples of 1/38, which costs nothing.
"""

import base64
import functools

import numpy as np
from jaxtyping import Float

__all__ = ["ERRORS", "MEMORY", "trellis_levels"]

MEMORY = 8  # bits of the register

# Share of a normal token's energy that is lost with D = 128, by bits per element.
ERRORS = {1: 0.289, 2: 0.0781, 3: 0.0215, 4: 0.00603, 5: 0.00191}

_UNIT = 38
_LEVELS = {
    1: (
        "4x3JAAvxG88V+hznAOEXySDoI+3YDML98hq35N8bIP4l1RbwADS95zDd0hL2+hvn9SfpMAjS90Y67gjd6R4dAAJN"
        "HuNI++QN6x7SGA/L9kYf3u30/BgZ5bPvRhH7ud4YKN4K2N4K3RDj5xn3/DLgFwUiD/gAKBLU2yAC+CnfSvjCAfIj"
        "5yT2/wnl7RQoN8cG1hX0Exnu9ycw7+4WJvYy7fQc0Qsl60gG9xv03yUb6SbtBiLA8TND/g3iGfK8AQTUKPDxKRbm"
        "Etgi2S/2ywkDE/AKti4Z5Osp8xcD0CbrC8bWD04TFMT6Pw0fAc3Y/6/28AcD69Tz/hzuHkkZEvvyLw=="
    ),
    2: (
        "PAsk8tTyC/e9AdQbAxjoM/i9IVhR3hw5ED71JPgK4x41/davTRr/zATsOhEO9dgtJAPC5vnSHzSQCvLg2Oj3UA8j"
        "9Sz6Td8YBsXrQKbLC+jcFuj2BlrUIfsQKei68y0J8zsl2Bg54wXGCR7y+gkb4ALQ8RkrXQfuQNQR+R47EvLR+N8O"
        "JA1Lp+kf/dHuO8sUJ/IFye4nCODrxxVU4LcJOhAW9DED6sMpFOe1MePX/8EEHuH8ci+cD+4puQzkF/zL+OQO0gbq"
        "JtAl5Bb6GOYwAAzhASgpCusDKe1HCw/XuO7N5wIa2AM17tyvA+oiIDwB4kYRMLP/79IdAtzC/fjRGQ=="
    ),
    3: (
        "DP/o9tIzVSAz+wcZ8SXiDuL3xCoaA7MR1Rf9KAsXNu7dB84a+O0ROwXav0Maz/zpMtwixUIP6vznC5UE9MnYt+Mn"
        "Uu8HHzMSEtAfC0bw6v8kuxQKCPruOwY6EWgg9+kByeT8TeUJ9fgk5ThY/d3DqRbpADT2RgnVwPBBGF4nDtzzFwjR"
        "Mf584eXw/NcPBBzCzCnaFZ/v3Lb94RvvCTKw0RE/gwImFSPsFwYmNSoQ1vQFD/CsLR364jgf6v65aEsrzjQeKN4P"
        "6wLQGOv/3vkrNrfQ4/dUJAfsHfkvRcriBhT98hbcQ+YHyfC+EyYKpv3b9djPJOGxEsXwyCPdnkL/VQ=="
    ),
    4: (
        "GST/HkG2zBH41zUGLOMI7y0V7tImPOcKyOAED/X9IR0l6fTW4u9J9wTpGa/cyv4ODwoiwR1vKNfe0csA5JrsFr0C"
        "0qERRuDr2scMOBgeUPgWWAv0BTE93uhK8CPC+yoAf7fl9BfTMygT3AIf/QgQBR3OFi3w4wAHvvsjD/jr2zoFICnj"
        "GvjQ/O8CEtkL7PXlQtv7C2TFGwLwMOb3T4GypFPxBBcx/hLEDPX86NUlPAgU1w/euQj2z+Qk/cftLxqQBuId6ikR"
        "7zfLC/cW8ta9/Q8FOkH/9ytK6e8i4TLc0PM3RC3+DgIJrtMXX+/m9Mfc/jSpIvkduxX14gcZJw9a6w=="
    ),
    5: (
        "FOzm7i/48Nv0ysW9F9UDoP8RDPrh6Ak3SxqmDhLy0Gbo/rAa+R/89fEMywnY3DPv4MW66+YBDir3QBQCBdAkXw/u"
        "8jsU9hfr8HF/ySD/LBwzB9LiCwT5393b6EUm15Dk+R1O2C7z083j8N4pmvqpJSHqyPYCDv/mCTeBE/xGBlX43y8k"
        "tBAaFRHo/PMNKOQIC9fCBjPtHh8YzgFBKiITPOoCPuUiCicNDtL5BPa57QXUwQjeNv3zESwnGf8crcwWBvklN/ET"
        "9O0cLQRJHhjX6NtR6zAK4ccAWuT3/Q/vIb37Ks7o3hy1Ge31//H/CQ8SFSPaHwYEwTED/OIW00I7DA=="
    ),
}


@functools.cache
def trellis_levels(bits: int) -> Float[np.ndarray, "256"]:
    """Returns the levels for codes of `bits` bits, in units of the deviation, for every register."""
    stored = np.frombuffer(base64.b64decode(_LEVELS[bits]), np.int8)
    return (stored / _UNIT).astype(np.float32)
