"""Self-Forcing's networks with random weights, as its benchmarks run them."""

import argparse
import dataclasses
import logging
import time
from typing import Any

from benchmarks.common import split_arm
from benchmarks.heads import write_list
from models.self_forcing.releases import RELEASES

__all__ = ["Setup"]

log = logging.getLogger("benchmark")


class Setup:
    """The networks with random weights, and a prompt."""

    def __init__(
        self,
        args: argparse.Namespace,
        *,
        vae: bool = True,
        sizes: Any = None,
        release: str = "self-forcing",
    ):
        import jax

        from models.runs.prompts import stand_in_embedding
        from models.self_forcing.entry import Options
        from models.self_forcing.params import WEIGHTS
        from models.self_forcing.settings import released_sizes, sizes_of
        from models.wan_vae.params import WEIGHTS as VAE

        self.args = args
        self.release = RELEASES[release]
        sizes = sizes_of(self.release, released_sizes()) if sizes is None else sizes
        dit = dataclasses.replace(sizes.dit, layers=args.layers or sizes.dit.layers)
        self.sizes = dataclasses.replace(sizes, dit=dit)
        listed, self.heads = {}, None
        if args.heads != "all":
            sizes_of_list = dict(layers=dit.layers, heads=dit.heads, multiple=args.head_multiple)
            listed = dict(heads=str(write_list(args.heads, args.out, **sizes_of_list)))
        self.options = Options(
            **listed,
            codec="bf16",
            compare=tuple(split_arm(a)[0] for a in (*args.arms, args.limit_arm)),
            height=args.height,
            width=args.width,
            span=args.span,
        )
        if listed:
            (kept,) = {h.heads for h in self._settled(21).histories.values() if h.heads is not None}
            self.heads = {
                "list": args.heads, "multiple": args.head_multiple, "with_a_history": kept.full,
                "of": kept.layers * kept.heads, "numbers_in_a_layer": sorted(set(kept.counts)),
                "local_frames": kept.local_blocks,
            }  # fmt: skip
        begin = time.perf_counter()
        self.model = jax.block_until_ready(WEIGHTS.random(dit, args.seed))
        self.vae = jax.block_until_ready(VAE.random(sizes.vae)) if vae else None
        size = dict(slots=dit.text_slots, width=dit.text_width, dtype=dit.dtype)
        self.text = stand_in_embedding("a red fox in the snow", **size).text_BUE
        log.info("weights made in %.1f s", time.perf_counter() - begin)

    def _settled(self, frames: int, **devices: Any):
        """The settings for videos of so many latent frames."""
        from models.self_forcing.settings import settle

        options = dataclasses.replace(self.options, frames=frames, **devices)
        return settle(options, self.sizes, release=self.release)

    def pipeline(self, arm: str, frames: int, capacity: int | None = None, **devices: Any):
        """The pipeline of an arm, and a request for a video of so many latent frames.

        Args:
            arm, frames: which and how many.
            capacity: frames that its cache is made for; None for as many.
            devices: options `devices`, `plan` and `share_weights` of the command.
        """
        import jax
        import numpy as np

        from models.common.attention import with_attention
        from models.self_forcing.pipeline import Generation, SelfForcing

        capacity = capacity or frames
        plan = self._settled(capacity, **devices)
        y, x = plan.latent
        request = Generation(
            text_BUE=self.text,
            frames=frames,
            latent_height=y,
            latent_width=x,
            noise=jax.random.key(self.args.seed),
            capacity=capacity,
            # As the command runs it, which can be interrupted and go on.
            done_BFZYX=np.zeros((1, 0, self.sizes.dit.latent_channels, y, x), self.sizes.dit.dtype),
        )
        codec, way = split_arm(arm)
        model = with_attention(self.model, way)
        share = devices.get("share_weights", False)
        pipeline = SelfForcing(
            model, sampler=plan.sampler, history=plan.histories[codec], share_weights=share
        )
        return pipeline, request
