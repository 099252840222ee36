"""The parameters of a model: names in checkpoints, loading, checking files, random ones.

WEIGHTS = Weights(Model, RULES)
model = WEIGHTS.load("model.safetensors", config)
WEIGHTS.check("model.safetensors", config)      # the same errors, no tensor read
model = WEIGHTS.random(config)                  # for benchmarks
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from models.common.checkpoint import Device, Rule, check, load

type Source = str | Path | Iterable[str | Path]


@dataclasses.dataclass(frozen=True)
class Weights[M: nnx.Module]:
    """The parameters of one kind of model.

    Args:
        make: `make(config, rngs=nnx.Rngs(seed))`, the module's class.
        rules: table of stored names.
        rename: `rename(stored name, config)`, applied before the rules.
        ignore: regular expressions of names to leave out on purpose.
    """

    make: Callable[..., M]
    rules: Sequence[Rule]
    rename: Callable[[str, Any], str] = lambda name, config: name
    ignore: Sequence[str] = ()

    def skeleton(self, config: Any) -> M:
        """The module with shapes and dtypes but no arrays."""
        return nnx.eval_shape(lambda: self.make(config, rngs=nnx.Rngs(0)))

    def load(
        self,
        source: Source,
        config: Any,
        *,
        device: Device = None,
    ) -> M:
        """The module with parameters from safetensors.

        Args:
            source: a file, a folder of shards, or several of either.
            config: sizes and dtype; stored values are cast to its dtype.
            device: where the parameters go, or a function of a parameter's dotted path and shape that
                says so; default: JAX's default device.

        Raises:
            CheckpointError: with every missing, unused and misshapen name.
        """
        return load(self.skeleton(config), source, device=device, **self._reading(config))

    def check(self, source: Source, config: Any) -> None:
        """Raises what `load` would raise, from the headers of the files alone."""
        check(self.skeleton(config), source, **self._reading(config))

    def random(self, config: Any, seed: int = 0) -> M:
        """The module with random parameters, made on the device by one program.

        They are drawn in their own dtype: there is no float32 copy.
        """
        # XLA's own generator: threefry takes far longer to compile and to run for billions.
        key = jax.random.key(seed, impl="rbg")
        return nnx.jit(lambda: self.make(config, rngs=nnx.Rngs(key)))()

    def _reading(self, config):
        return dict(
            rules=self.rules,
            rename=lambda name: self.rename(name, config),
            ignore=self.ignore,
        )
