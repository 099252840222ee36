"""What `qvg verify pocket-world` does: one way back over a tour, with the weights of this repository."""

from qvg_jax.app.protocol import Band, Protocol, Published, Window

HERE = "README.md of this repository: 64 frames after tours of 512, means of several tours"

ALL = "all frames"
WHY = "5 dB below what two CPU cores gave, 2026-11-28"

PROTOCOL = Protocol(
    frames=96,
    recipes=("trellis", "midrise", "qvg", "rtn"),
    windows=(Window("the first 48 frames", 0, 48), Window(ALL)),
    published=(
        Published(recipe="trellis", ours="trellis", source=HERE, psnr=51.1),
        Published(recipe="midrise", ours="midrise", source=HERE, psnr=36.6),
        Published(recipe="QVG", ours="qvg", source=HERE, psnr=28.7),
    ),
    bands=(
        Band(recipe="trellis", window=ALL, least=45.0, why=WHY),
        Band(recipe="midrise", window=ALL, least=31.8, why=WHY),
        Band(recipe="qvg", window=ALL, least=25.0, why=WHY),
    ),
)
