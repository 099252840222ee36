"""What `qvg verify worldplay` does: the published walk of 189 frames, compared by its first frames."""

from qvg_jax.app.protocol import Band, Protocol, Published, Window

TABLE = (
    "QVG (arXiv 2602.02958) v5, Table 1, as transcribed in an independent reproduction "
    "(github.com/JamesSand/Quant-VideoGen, 2026-07)"
)
REPRODUCTION = "github.com/JamesSand/Quant-VideoGen, 2026-07, its own measurement"
SIXTEEN, THIRTY_TWO, ALL = "the first 16 frames", "the first 32 frames", "all frames"

PROTOCOL = Protocol(
    frames=48,  # latent frames, 189 of the video
    recipes=("qvg", "qvg-pro", "qvg-asym", "rtn"),
    options={"actions": "w-8,s-8,a-8,d-8,up-8,down-8"},
    prompts=(
        "A stone bridge over a quiet lake, trees in autumn colours.",
        "A library with tall shelves and a long wooden table.",
        "A village square at noon, a fountain in its middle.",
    ),
    windows=(Window(SIXTEEN, 0, 16), Window(THIRTY_TWO, 0, 32), Window(ALL)),
    published=(
        Published(recipe="QVG", ours="qvg", source=REPRODUCTION, psnr=34.36, window=SIXTEEN),
        Published(recipe="QVG", ours="qvg", source=REPRODUCTION, psnr=26.58, window=THIRTY_TWO),
        Published(recipe="QVG", ours="qvg", source=REPRODUCTION, psnr=17.45, window=ALL),
        Published(
            recipe="QVG INT2, 7.05x", ours="qvg", source=TABLE, psnr=29.174, ssim=0.882, lpips=0.094
        ),
        Published(
            recipe="QVG-Pro, 5.20x", ours="qvg-pro", source=TABLE, psnr=31.562, ssim=0.923,
            lpips=0.069,
        ),
        Published(recipe="RTN", ours="rtn", source=TABLE, psnr=24.199, ssim=0.696, lpips=0.229),
        Published(recipe="KIVI", source=TABLE, psnr=24.272, ssim=0.701, lpips=0.230),
        Published(recipe="QuaRot", source=TABLE, psnr=25.207, ssim=0.738, lpips=0.205),
    ),
    bands=(
        Band(
            recipe="qvg",
            window=SIXTEEN,
            least=31.3,
            why="3 dB below the reproduction's 34.36; a limit of this project",
        ),
    ),
    notes=(
        "A walk that comes back to a place draws it from memory: from there on, near frame 29 of this "
        "walk, a video may be another one of the same place. Means over all frames say where that "
        "happens, not how good the cache is.",
        "Without --image a walk begins from the prompt alone; give the picture of your comparison.",
    ),
)  # fmt: skip
