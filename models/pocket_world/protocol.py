"""What `qvg verify pocket-world` does: one way back over a tour, with the weights of this repository."""

from qvg_jax.app.protocol import Protocol, Published, Window

HERE = "README.md of this repository: 64 frames after tours of 512, means of several tours"

PROTOCOL = Protocol(
    frames=96,
    recipes=("midrise", "qvg", "rtn"),
    windows=(Window("the first 48 frames", 0, 48), Window("all frames")),
    published=(
        Published(recipe="trellis", ours="trellis", source=HERE, psnr=51.1),
        Published(recipe="midrise", ours="midrise", source=HERE, psnr=36.6),
        Published(recipe="QVG", ours="qvg", source=HERE, psnr=28.7),
    ),
)
