"""What `qvg verify lingbot` does: a walk of 48 latent frames; nobody has published numbers for it."""

from qvg_jax.app.protocol import Protocol, Window

PROTOCOL = Protocol(
    frames=48,
    recipes=("qvg", "qvg:bits=4:group=64:num_centroids=256:iters=2", "qvg-asym", "rtn"),
    options={"actions": "w-16,right-8,s-16,left-8"},
    prompts=(
        "A narrow street between stone houses, flower pots below the windows.",
        "A hall with columns, daylight falls in from the right.",
    ),
    windows=(
        # Sink and newest block stay as they are: the first span is compressed before latent frame 16.
        Window("the 16 frames after the first compression", 61, 77),
        Window("the first 120 frames", 0, 120),
        Window("all frames"),
    ),
    notes=(
        "No numbers of others are known for this model, so nothing passes or fails.",
        "The release wants a picture: give --image.",
    ),
)
