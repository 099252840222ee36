"""The procedural world: a pure function of a seed, a camera and a time.

The land is a plane of noise (sea, beach, fields, forest, rock, snow) seen from above at an
oblique angle. One *sprite* may stand in each 16-unit cell: house, conifer, boat, tower. Because the
projection is parallel, moving the camera shifts the image and rising scales it; because every
colour comes from hashing the seed with integer coordinates, any place looks the same
whenever the camera returns, so generated frames always have a ground truth.

Boats sway and beacons blink with a common clock of `CLOCK` frames: a place revisited is not always
a copy of what was seen.

Units: one world unit is one pixel at altitude 0. x grows to the east, y to the south.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

HEIGHT, WIDTH = 64, 96  # pixels
CELL = 16.0  # world units between sprite anchors
CLOCK = 32  # frames in one turn of the world's clock
MAX_ALTITUDE = 2  # notches; each widens the view by half of that on the ground
_SUPERSAMPLE = 2  # samples per pixel and axis


def units_per_pixel(altitude):
    """World units per pixel at an altitude given in notches: 1 + altitude / 2."""
    return 1.0 + altitude / 2.0


def _hash(x):
    """A 32-bit integer finaliser (xor-shift, multiply), the source of all randomness here."""
    x = x ^ (x >> 16)
    x = x * jnp.uint32(0x7FEB352D)
    x = x ^ (x >> 15)
    x = x * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _random(seed, ix, iy, stream):
    """Uniform [0, 1) numbers that depend on the seed, an integer position and a stream number."""
    h = seed.astype(jnp.uint32) * jnp.uint32(2654435761) + jnp.uint32(stream * 97 + 1)
    h = _hash(h ^ (ix.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)))
    h = _hash(h + iy.astype(jnp.uint32) * jnp.uint32(0x85EBCA6B))
    return (h >> 8).astype(jnp.float32) * (1.0 / 16777216.0)


def _noise(seed, x, y, stream):
    """Smooth value noise in [0, 1] with one lattice cell per unit of x and y."""
    x0, y0 = jnp.floor(x), jnp.floor(y)
    ix, iy = x0.astype(jnp.int32), y0.astype(jnp.int32)
    fx, fy = x - x0, y - y0
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    r = functools.partial(_random, seed, stream=stream)
    top = r(ix, iy) * (1 - fx) + r(ix + 1, iy) * fx
    bottom = r(ix, iy + 1) * (1 - fx) + r(ix + 1, iy + 1) * fx
    return top * (1 - fy) + bottom * fy


def _step(edge, width, x):
    """0 below the edge, 1 above it, a smooth ramp of the given width between."""
    t = jnp.clip((x - edge) / width + 0.5, 0.0, 1.0)
    return t * t * (3 - 2 * t)


def _mix(a, b, t):
    return a + (b - a) * t[..., None]


def _rgb(r, g, b):
    return jnp.array([[[r, g, b]]], jnp.float32)  # a one-pixel image


def _hue(h):
    """A saturated colour from a hue in [0, 1)."""
    phase = _rgb(0.0, 1 / 3, 2 / 3)
    return 0.52 + 0.42 * jnp.cos(2 * jnp.pi * (h[..., None] + phase))


def _elevation(seed, x, y):
    return (
        0.62 * _noise(seed, x / 88.0, y / 88.0, 0)
        + 0.27 * _noise(seed, x / 41.0, y / 41.0, 1)
        + 0.11 * _noise(seed, x / 19.0, y / 19.0, 2)
    )


def _moisture(seed, x, y):
    return 0.7 * _noise(seed, x / 70.0, y / 70.0, 5) + 0.3 * _noise(seed, x / 27.0, y / 27.0, 6)


_SEA, _ROCK, _SNOW = 0.42, 0.64, 0.72  # elevations where the land changes


def _ground(seed, x, y):
    """Colour of the land itself, [Y, X, 3] in [0, 1]."""
    e, m = _elevation(seed, x, y), _moisture(seed, x, y)
    slope = e - _elevation(seed, x + 3.0, y + 3.0)  # light from the north-west
    depth = jnp.clip((_SEA - e) / 0.2, 0.0, 1.0)
    sea = _mix(_rgb(0.20, 0.52, 0.62), _rgb(0.07, 0.20, 0.44), depth)
    # Fields: square plots with a tint of their own, so that each place has something to remember.
    px, py = jnp.floor(x / 24.0), jnp.floor(y / 24.0)
    plot = _random(seed, px.astype(jnp.int32), py.astype(jnp.int32), 11)
    fx, fy = x - 24.0 * px, y - 24.0 * py
    hedge = (jnp.minimum(fx, fy) < 1.5).astype(jnp.float32)
    field = _mix(_rgb(0.42, 0.60, 0.24), _rgb(0.78, 0.70, 0.34), _step(0.55, 0.5, plot))
    field = _mix(field, _rgb(0.55, 0.38, 0.26), (plot > 0.86).astype(jnp.float32))
    field = _mix(field, _rgb(0.25, 0.40, 0.18), 0.7 * hedge)
    land = _mix(field, _rgb(0.36, 0.56, 0.24), _step(0.46, 0.03, m))
    land = _mix(land, _rgb(0.16, 0.38, 0.20), _step(0.56, 0.04, m))
    land = _mix(land, _rgb(0.50, 0.47, 0.45), _step(_ROCK, 0.03, e))
    land = _mix(land, _rgb(0.93, 0.94, 0.97), _step(_SNOW, 0.02, e))
    land = _mix(_rgb(0.90, 0.82, 0.58), land, _step(_SEA + 0.035, 0.015, e))
    relief = jnp.clip(1.0 + 5.0 * slope, 0.7, 1.3)[..., None]
    return _mix(sea, land * relief, _step(_SEA, 0.012, e))


def _sprite(seed, x, y, cx, cy, clock):
    """What the sprite anchored in cell (cx, cy) shows at (x, y): colour, cover, shadow."""
    r = functools.partial(_random, seed, cx, cy)
    ax = (cx.astype(jnp.float32) + 0.5) * CELL + (r(21) - 0.5) * 5.0
    ay = (cy.astype(jnp.float32) + 0.85) * CELL - r(22) * 4.0
    e, m = _elevation(seed, ax, ay), _moisture(seed, ax, ay)
    kind, hue, size = r(23), r(24), r(25)
    at_sea = e < _SEA - 0.03
    on_land = e > _SEA + 0.04
    landmark = (kind < 0.07) & (on_land | at_sea)
    boat = at_sea & (kind >= 0.07) & (kind < 0.25)
    wood = on_land & (m > 0.56) & (e < _SNOW)
    house = on_land & ~wood & ~landmark & (e < _ROCK) & (kind < 0.50)
    tree = on_land & ~landmark & (e < _SNOW) & (wood | (kind > 0.80))
    turn = 2 * jnp.pi * clock
    ax = ax + jnp.where(boat, 2.5 * jnp.sin(turn), 0.0)
    u, v = x - ax, ay - y  # v: height above the foot, in pixels of the oblique view
    colour, white, dark = _hue(hue), _rgb(0.95, 0.93, 0.88), _rgb(0.20, 0.16, 0.15)

    half, wall = 3.4 + 1.4 * size, 4.5
    in_wall = (jnp.abs(u) < half) & (v >= 0) & (v < wall)
    in_roof = (v >= wall) & (v < wall + 5) & (jnp.abs(u) < half + 1.0 - 0.45 * (v - wall))
    opening = ((jnp.abs(u + 1.2) < 0.8) & (v < 3)) | (
        (jnp.abs(u - 1.8) < 0.7) & (jnp.abs(v - 2.6) < 0.8)
    )
    house_colour = jnp.where(opening[..., None], dark, _rgb(0.90, 0.82, 0.68))
    house_colour = jnp.where(
        in_roof[..., None], colour * (0.80 + 0.06 * (v - wall))[..., None], house_colour
    )
    house_cover = in_wall | in_roof

    tall = 9.0 + 2.0 * size
    in_tree = (v >= 1) & (v < tall) & (jnp.abs(u) < 0.42 * (tall - v))
    green = _mix(_rgb(0.10, 0.30, 0.16), _rgb(0.30, 0.48, 0.16), hue)
    tree_colour = green * jnp.where(u < 0, 1.15, 0.80)[..., None]

    in_hull = (v >= 0) & (v < 2) & (jnp.abs(u) < 2.4 + 0.6 * v)
    in_sail = (v >= 2) & (v < 9) & (u > -0.6) & (u < 0.55 * (9 - v))
    boat_colour = jnp.where(
        in_hull[..., None], _rgb(0.38, 0.22, 0.14), _mix(white, colour, jnp.float32(0.35) + 0 * u)
    )

    height = 13.0
    in_tower = (v >= 0) & (v < height) & (jnp.abs(u) < 2.6 - 0.06 * v)
    band = (jnp.floor(v / 2.6).astype(jnp.int32) % 2 == 0)[..., None]
    lit = jnp.cos(turn) > 0
    lamp = jnp.where(lit[..., None], _rgb(1.0, 0.95, 0.45), _rgb(0.35, 0.33, 0.30))
    tower_colour = jnp.where((v > height - 2.6)[..., None], lamp, jnp.where(band, colour, white))

    cover = (
        (landmark & in_tower)
        | (house & house_cover)
        | (tree & in_tree)
        | (boat & (in_hull | in_sail))
    )
    out = jnp.where(landmark[..., None], tower_colour, house_colour)
    out = jnp.where((tree & ~landmark)[..., None], tree_colour, out)
    out = jnp.where(boat[..., None], boat_colour, out)
    something = (landmark | house | tree).astype(jnp.float32)
    shadow = something * jnp.clip(1.0 - ((u - 2.5) / 5.5) ** 2 - ((v + 0.2) / 2.2) ** 2, 0.0, 1.0)
    return out, cover.astype(jnp.float32), shadow


def colour_at(seed, x, y, clock):
    """Colour of the world at ground coordinates x, y [Y, X] and clock in [0, 1): [Y, X, 3]."""
    cx, cy = jnp.floor(x / CELL).astype(jnp.int32), jnp.floor(y / CELL).astype(jnp.int32)
    far, far_cover, far_shadow = _sprite(seed, x, y, cx, cy, clock)
    near, near_cover, near_shadow = _sprite(seed, x, y, cx, cy + 1, clock)  # stands in front
    out = (
        _ground(seed, x, y) * (1.0 - 0.45 * jnp.clip(far_shadow + near_shadow, 0.0, 1.0))[..., None]
    )
    return jnp.clip(_mix(_mix(out, far, far_cover), near, near_cover), 0.0, 1.0)


def render(
    seed: Int[Array, ""], pose_F3: Float[Array, "F 3"], time_F: Int[Array, "F"]
) -> Float[Array, "F 64 96 3"]:
    """Renders F frames of one world.

    Args:
        seed: int32 scalar; the world.
        pose_F3: camera x, y (world units) and altitude (notches, 0 to `MAX_ALTITUDE`).
        time_F: int32 frame numbers, for what moves.

    Returns:
        Frames in [-1, 1], [F, HEIGHT, WIDTH, 3], each pixel the mean of 2 x 2 samples.
    """
    n = _SUPERSAMPLE
    oy = (jnp.arange(HEIGHT * n) + 0.5) / n - HEIGHT / 2
    ox = (jnp.arange(WIDTH * n) + 0.5) / n - WIDTH / 2

    def frame(pose, t):
        s = units_per_pixel(pose[2])
        x = jnp.broadcast_to((pose[0] + ox * s)[None, :], (HEIGHT * n, WIDTH * n))
        y = jnp.broadcast_to((pose[1] + oy * s)[:, None], (HEIGHT * n, WIDTH * n))
        clock = (t % CLOCK).astype(jnp.float32) / CLOCK
        image = colour_at(seed, x, y, clock)
        return image.reshape(HEIGHT, n, WIDTH, n, 3).mean((1, 3))

    return jax.vmap(frame)(pose_F3, time_F) * 2.0 - 1.0
