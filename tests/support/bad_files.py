"""Files that nobody should be able to make a command trip over: the corpus of tables and fuzzers."""

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

DEEP = 100_000  # brackets inside of each other
ESCAPE = "\x1b[31mred\x07"


# Safetensors ------------------------------------------------------------------------------------


def tensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header, bytes or JSON, and any length stated for it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def split(file: bytes) -> tuple[dict, bytes]:
    """The header and the data of a safetensors file."""
    (length,) = struct.unpack_from("<Q", file)
    return json.loads(file[8 : 8 + length]), file[8 + length :]


_ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TENSORS = {
    "empty": b"",
    "seven bytes": b"1234567",
    "no header": struct.pack("<Q", 0),
    "header longer than the file": tensors({}, length=1000),
    "header of 2^63 bytes": tensors({}, length=2**63),
    "header of no JSON": tensors(b"{never}"),
    "header of a list": tensors(["a"]),
    "header of bytes": tensors(b"\xff\xfe\x00" * 9),
    "header nested deeply": tensors(b"[" * DEEP),
    "an entry that is a number": tensors({"a": 3}),
    "an entry without a dtype": tensors({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"0" * 8),
    "an unknown dtype": tensors({"a": _ONE | {"dtype": "F31"}}, b"0" * 8),
    "a negative shape": tensors({"a": _ONE | {"shape": [-2]}}, b"0" * 8),
    "a shape beyond the data": tensors({"a": _ONE | {"shape": [2**40]}}, b"0" * 8),
    "a shape that overflows": tensors({"a": _ONE | {"shape": [2**33, 2**33]}}, b"0" * 8),
    "offsets beyond the file": tensors({"a": _ONE | {"data_offsets": [0, 2**40]}}, b"0" * 8),
    "offsets the wrong way": tensors({"a": _ONE | {"data_offsets": [8, 0]}}, b"0" * 8),
    "overlapping tensors": tensors({"a": _ONE, "b": _ONE}, b"0" * 8),
    "bytes that belong to nothing": tensors({"a": _ONE}, b"0" * 80),
    "metadata that is a number": tensors({"__metadata__": 3}),
    "metadata of numbers": tensors({"__metadata__": {"a": 3}}),
    "a zip": b"PK\x03\x04" + b"0" * 64,
}

# The configuration in the header of pocket world's weights; None takes the key away.
EMBEDDED = [
    *(("width", bad) for bad in (0, -1, 1.5, "x", None, True, [16], {}, 10**30, 2**14 + 1)),
    *(("layers", bad) for bad in (0, 10**7, "two", -3, 2.5)),
    *(("heads", bad) for bad in (0, -1, "x", 10**9)),
    *(("head_dim", bad) for bad in (0, 7, 30, 33, "128", -128, 2**20)),
    *(("mlp_ratio", bad) for bad in (0, "x", -2)),
    *(("patch", bad) for bad in (0, 7, -16, 1.0, 2**20)),
    *(("block_frames", bad) for bad in (0, -4, 10**6)),
    *(("noise_channels", bad) for bad in (0, 1, 3, "x")),
    *(("condition_width", bad) for bad in (0, [], -1.5)),
    *(("features", bad) for bad in (0, 3, "x")),
    ("surprise", 1),
    (ESCAPE, 1),
]


def embedded(weights: bytes, **changes: object) -> bytes:
    """Weights of pocket world whose header has another configuration."""
    header, data = split(weights)
    config = json.loads(header["__metadata__"]["config"])
    for name, value in changes.items():
        config[name] = value
    header["__metadata__"]["config"] = json.dumps(config)
    return tensors(header, data)


def in_header(weights: bytes, config: str | None) -> bytes:
    """Weights of pocket world with any text as their configuration, or none."""
    header, data = split(weights)
    if config is None:
        del header["__metadata__"]["config"]
    else:
        header["__metadata__"]["config"] = config
    return tensors(header, data)


# JSON -------------------------------------------------------------------------------------------

TEXTS = {
    "empty": b"",
    "half": b'{"dim": 3',
    "no JSON": b"never",
    "bytes": b"\xff\xfe\x00",
    "a text that is no UTF-8": b'"dim\x80": 3',
    "a list": b"[1, 2]",
    "null": b"null",
    "a number": b"3",
    "NaN": b'{"dim": NaN}',
    "nested deeply": b"[" * DEEP,
    "objects nested deeply": b'{"a":' * DEEP,
    "a number of 400 digits": b'{"dim": ' + b"9" * 400 + b"}",
    "two megabytes": b'{"a": "' + b"x" * 2**21 + b'"}',
}

WAN = {
    "num_layers": ("x", 0, -1, 1.5, 10**7, None, [2], True),
    "dim": ("x", 0, -32, 32.5, None, 10**12, {}),
    "num_heads": (0, 3, "x", -2, 10**6),
    "ffn_dim": (0, "x", None),
    "in_dim": ([16], 0, "x"),
    "out_dim": (0, None, "x"),
    "freq_dim": (7, 0, "x"),
    "text_len": (0, "x", 10**9),
    "eps": (0, -1, "x", None, 1e400),
    "text_dim": (0, "x"),
    "patch_size": ([2, 2, 2], [1, 2], "x", [1, 0, 2], [1, "x", 2], None, 2),
    "head_dim": (17, "x"),
    "qk_norm": (False, "rms", None),
    "model_type": ("i2v", 3),
}

INDICES = {
    "a list": [],
    "null": None,
    "no map": {"metadata": {}},
    "a map that is a list": {"weight_map": ["a"]},
    "an empty map": {"weight_map": {}},
    "numbers": {"weight_map": {"a": 3}},
    "null inside": {"weight_map": {"a": None}},
    "a name of 5,000 characters": {"weight_map": {"a": "x" * 5000}},
    "a path out of the folder": {"weight_map": {"a": "../x.safetensors"}},
    "an absolute path": {"weight_map": {"a": "/etc/passwd"}},
    "a path into a folder": {"weight_map": {"a": "b/c.safetensors"}},
    "a path of Windows": {"weight_map": {"a": "..\\x.safetensors"}},
    "no name": {"weight_map": {"a": ""}},
    "the folder itself": {"weight_map": {"a": "."}},
    "the folder above": {"weight_map": {"a": ".."}},
    "a NUL": {"weight_map": {"a": "a\0.safetensors"}},
    "escape codes": {"weight_map": {"a": ESCAPE}},
    "a file that is not there": {"weight_map": {"a": "other.safetensors"}},
    "99,999 shards": {"weight_map": {"a": "m-00001-of-99999.safetensors"}},
    "2,000 shards": {"weight_map": {str(i): f"{i}.safetensors" for i in range(2000)}},
}


# .npz -------------------------------------------------------------------------------------------


def plain(**changes: object) -> dict[str, np.ndarray]:
    """K, V and Q that are accepted, with changes."""
    draw = np.random.default_rng(0)
    arrays = {n: draw.standard_normal((1, 1, 1, 16, 16)).astype(np.float32) for n in "kvq"}
    return {n: x for n, x in (arrays | changes).items() if x is not None}


def npz(arrays: dict, compression: int = zipfile.ZIP_STORED) -> bytes:
    """An .npz of arrays, or of any bytes in place of one."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, x in arrays.items():
            archive.writestr(f"{name}.npy", x if isinstance(x, bytes) else npy(x))
    return file.getvalue()


def npy(x: np.ndarray) -> bytes:
    """An array as .npy, pickled if it holds objects."""
    file = io.BytesIO()
    np.save(file, x, allow_pickle=True)
    return file.getvalue()


def header(text: str, data: bytes = b"") -> bytes:
    """An .npy with any text for a header."""
    line = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(line)) + line + data


def _shaped(shape: str, dtype: str = "'<f4'") -> bytes:
    return header(f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}}}", b"0" * 64)


def encrypted() -> bytes:
    """An .npz whose members say that they are encrypted."""
    data = bytearray(npz(plain()))
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = -1
        while (start := data.find(mark, start + 1)) >= 0:
            data[start + at] |= 1
    return bytes(data)


def bomb(megabytes: int = 64) -> bytes:
    """An .npz of some kilobytes that stands for megabytes of zeros."""
    x = np.zeros((1, 1, 1, megabytes * 2**20 // 64, 16), np.float32)
    return npz(plain(k=x, v=x), zipfile.ZIP_DEFLATED)


_X = plain()["k"]
ARRAYS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"not an npz",
    "an .npy": lambda: npy(_X),
    "torn": lambda: npz(plain())[:-40],
    "torn in the middle": lambda: npz(plain())[:700],
    "a wrong checksum": lambda: npz(plain()).replace(_X.tobytes()[:8], b"01234567", 1),
    "no arrays": lambda: npz({}),
    "no q": lambda: npz(plain(q=None)),
    "complex": lambda: npz(plain(k=_X.astype(np.complex64))),
    "strings": lambda: npz(plain(v=_X.astype("U32"))),
    "objects": lambda: npz(plain(q=_X.astype(object))),
    "integers": lambda: npz(plain(k=np.ones_like(_X, np.int32))),
    "flags": lambda: npz(plain(k=np.ones_like(_X, bool))),
    "long doubles": lambda: npz(plain(k=_X.astype(np.longdouble))),
    "8-bit floats": lambda: npz(plain(k=_X.astype(ml_dtypes.float8_e4m3fn))),
    "records": lambda: npz(plain(k=np.zeros(4, [("a", "<f4"), ("b", "<f4")]))),
    "dates": lambda: npz(plain(k=np.zeros(_X.shape, "datetime64[s]"))),
    "no queries": lambda: npz(plain(q=_X[:, :, :, :0])),
    "no tokens": lambda: npz(plain(k=_X[:, :, :, :0], v=_X[:, :, :, :0])),
    "no heads": lambda: npz(plain(k=_X[:, :, :0], v=_X[:, :, :0], q=_X[:, :, :0])),
    "zeros in K": lambda: npz(plain(k=np.zeros_like(_X))),
    "zeros in V": lambda: npz(plain(v=np.zeros_like(_X))),
    "zeros in Q": lambda: npz(plain(q=np.zeros_like(_X))),
    "NaN": lambda: npz(plain(k=np.full_like(_X, np.nan))),
    "Inf": lambda: npz(plain(v=np.full_like(_X, np.inf))),
    "four axes": lambda: npz(plain(k=_X[0], v=_X[0], q=_X[0])),
    "a scalar": lambda: npz(plain(k=np.float32(1))),
    "K and V that differ": lambda: npz(plain(v=_X[..., :8])),
    "heads that do not divide": lambda: npz(
        plain(k=np.repeat(_X, 2, 2), v=np.repeat(_X, 2, 2), q=np.repeat(_X, 3, 2))
    ),
    "a turn of text": lambda: npz(plain(turn_k=np.full((2, 1, 16, 8), "x"))),
    "a turn that is NaN": lambda: npz(plain(turn_k=np.full((2, 1, 16, 8), np.nan))),
    "a turn of another shape": lambda: npz(plain(turn_q=np.ones((2, 1, 16, 3)))),
    "a pairing of no name": lambda: npz(plain(pairing=np.array("both"))),
    "a pairing of escape codes": lambda: npz(plain(pairing=np.array(ESCAPE))),
    "layers of text": lambda: npz(plain(layers=np.array(["x"]))),
    "encrypted": encrypted,
    "compressed by bzip2": lambda: npz(plain(), zipfile.ZIP_BZIP2),
    "compressed by lzma": lambda: npz(plain(), zipfile.ZIP_LZMA),
    "a bomb": bomb,
    "a shape beyond the data": lambda: npz(plain(k=_shaped("(1, 1, 1, 10**3, 16)"))),
    "a shape of terabytes": lambda: npz(plain(k=_shaped("(1, 1, 1, 1099511627776, 16)"))),
    "a negative shape": lambda: npz(plain(k=_shaped("(1, 1, 1, -16, 16)"))),
    "a shape that is code": lambda: npz(plain(k=_shaped("(len('ab'),)"))),
    "a shape of floats": lambda: npz(plain(k=_shaped("(1.0, 2.0)"))),
    "a header nested deeply": lambda: npz(plain(k=_shaped("(" * 3000))),
    "a header of 60 kB": lambda: npz(plain(k=_shaped("(1,)" + " " * 60_000))),
    "a dtype of no name": lambda: npz(plain(k=_shaped("(1,)", "'<q9'"))),
    "a dtype of objects": lambda: npz(plain(k=_shaped("(1,)", "'|O'"))),
    "a member that is no .npy": lambda: npz(plain(k=b"never")),
    "a member of nothing": lambda: npz(plain(k=b"")),
    "a directory of 2,000 names": lambda: npz({f"{i:080}": b"" for i in range(2000)}),
}


# Pictures ---------------------------------------------------------------------------------------


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that says it has a size, with any bytes for its pixels."""
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body)
        return struct.pack(">L", len(body)) + kind + body + struct.pack(">L", crc)

    head = struct.pack(">LLBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


PICTURES: dict[str, bytes] = {
    "empty": b"",
    "text": b"not a picture",
    "a header alone": png(48, 32)[:20],
    "60,000 x 60,000": png(60_000, 60_000),
    "20,000 x 20,000": png(20_000, 20_000),
    "12,000 x 12,000": png(12_000, 12_000),
    "2^31 x 1": png(2**31 - 1, 1),
    "no width": png(0, 32),
    "a JPEG that ends": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00",
    "a playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://localhost:1/x.png\n",
    "a list of files": b"ffconcat version 1.0\nfile /etc/hostname\n",
    "an mp4 of nothing": struct.pack(">L4s", 24, b"ftyp") + b"isom\x00\x00\x02\x00isommp42",
    "an mp4 of a huge box": struct.pack(">L4sQ", 1, b"moov", 2**62),
    "sound": b"RIFF\x24\x08\x00\x00WAVEfmt \x10\x00\x00\x00\x01\x00\x01\x00\x40\x1f\x00\x00"
    b"\x80\x3e\x00\x00\x02\x00\x10\x00data\x00\x08\x00\x00" + b"\0" * 2048,
    "a GIF of no frames": b"GIF89a\x10\x00\x10\x00\x00\x00\x00\x3b",
    "an svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
}


def wan_folder(folder: Path, config: bytes | None = None) -> Path:
    """The folder with another config.json."""
    (folder / "config.json").write_bytes(config or b"{}")
    return folder
