"""What `qvg verify self-forcing` does: 705 frames of four prompts."""

from qvg_jax.app.protocol import Band, Protocol, Published, Window

REBUTTAL = (
    "QVG (arXiv 2602.02958), rebuttal, as transcribed in an independent reproduction "
    "(github.com/JamesSand/Quant-VideoGen, 2026-07)"
)
ONSET = "the 12 frames after the first span was compressed"

PROTOCOL = Protocol(
    # Latent frames. The first span, of 24, is compressed before the latent frames 24, 25 and 26 are
    # made, which are the frames 93 to 104 of the video.
    frames=177,
    recipes=("qvg", "qvg-pro", "qvg-asym", "rtn"),
    prompts=(
        "A lighthouse keeper climbs a spiral staircase with a lantern, the camera follows her.",
        "A tram passes through a rainy street at night, its lights are mirrored in the puddles.",
        "Two foxes play in deep snow at the edge of a forest, low winter sun.",
        "A hand draws a map with black ink on thick paper, seen from above.",
    ),
    windows=(
        Window(ONSET, 93, 105),
        Window("the first 200 frames", 0, 200),
        Window("all frames"),
    ),
    published=(
        Published(
            recipe="QVG INT2", ours="qvg", psnr=27.42, ssim=0.8729, lpips=0.0769, source=REBUTTAL
        ),
        Published(recipe="sliding window, bf16", psnr=16.61, source=REBUTTAL),
        Published(recipe="sink and window, bf16", psnr=21.48, source=REBUTTAL),
    ),
    bands=(
        Band(
            recipe="qvg",
            window=ONSET,
            least=24.4,
            why="3 dB below the rebuttal's 27.42, whose frames are not stated; a limit of this project",
        ),
    ),
    notes=(
        "Frames before the first compression are those of bf16 but for rounding, and a window that "
        "contains them looks better than it is.",
        "A long video leaves its bf16 twin by chaos, not by lack of quality: windows later than the "
        "first frames say little. Others compare long videos by VBench.",
    ),
)
