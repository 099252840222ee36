"""`qvg convert` with a stand-in for PyTorch, which is not among the test dependencies."""

import importlib
import pickle
import types

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qvg_jax.app import cli
from qvg_jax.app.convert import convert


class Storage:
    def __init__(self, array):
        base = array if array.base is None else array.base
        self._base = base

    def data_ptr(self):
        return self._base.ctypes.data

    def nbytes(self):
        return self._base.nbytes


class Tensor:
    """The few methods of a PyTorch tensor that are used."""

    def __init__(self, array):
        self.array = array

    def untyped_storage(self):
        return Storage(self.array)

    def numel(self):
        return self.array.size

    def element_size(self):
        return self.array.itemsize

    def contiguous(self):
        return Tensor(np.ascontiguousarray(self.array)) if self.array.base is not None else self

    def clone(self):
        return Tensor(self.array.copy())


def tensor(*shape):
    return Tensor(np.arange(np.prod(shape), dtype=np.float32).reshape(*shape).copy())


@pytest.fixture
def torch(monkeypatch):
    """A module `torch` whose `load` returns what the test puts in `content`."""
    fake = types.SimpleNamespace(Tensor=Tensor, content=None, calls=[])

    def load(path, **arguments):
        fake.calls.append(arguments)
        if isinstance(fake.content, Exception):
            raise fake.content
        if arguments.get("mmap") and getattr(fake, "old", False):
            raise RuntimeError("mmap can only be used with files saved with zipfile")
        return fake.content

    def save(tensors, path, metadata):
        places = [x.untyped_storage().data_ptr() for x in tensors.values()]
        assert len(set(places)) == len(places), "tensors share memory"
        save_file({name: x.array for name, x in tensors.items()}, path, metadata=metadata)

    fake.load = load
    modules = {"torch": fake, "safetensors.torch": types.SimpleNamespace(save_file=save)}
    found = importlib.import_module
    monkeypatch.setattr(
        importlib, "import_module", lambda name: modules[name] if name in modules else found(name)
    )
    return fake


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "w.pt"
    path.write_bytes(b"zip")
    return path


def test_the_averaged_weights_are_taken_and_nothing_is_executed(torch, source, tmp_path):
    torch.content = {
        "generator": {"model.a": tensor(2)},
        "generator_ema": {"model.a": tensor(2, 3), "model.b": tensor(4), "step": 7},
        "optimizer": {"state": {}},
    }
    assert cli.main(["convert", str(source), str(tmp_path / "w.safetensors")]) == 0
    arrays = load_file(tmp_path / "w.safetensors")
    assert {name: x.shape for name, x in arrays.items()} == {"model.a": (2, 3), "model.b": (4,)}
    np.testing.assert_array_equal(arrays["model.a"], np.arange(6).reshape(2, 3))
    assert all(c["weights_only"] is True and c["map_location"] == "cpu" for c in torch.calls)
    assert {p.name for p in tmp_path.iterdir()} == {"w.pt", "w.safetensors"}


def test_a_bare_mapping_old_files_and_an_entry_by_name(torch, source, tmp_path):
    torch.content, torch.old = {"conv1.weight": tensor(3), "deep": {"x": tensor(1)}}, True
    done = convert(source, tmp_path / "a.safetensors")
    assert done == {"entry": None, "tensors": 2, "bytes": 16}
    assert set(load_file(tmp_path / "a.safetensors")) == {"conv1.weight", "deep.x"}
    done = convert(source, tmp_path / "b.safetensors", entry="deep")
    assert done["entry"] == "deep" and set(load_file(tmp_path / "b.safetensors")) == {"x"}


def test_tied_and_sliced_tensors_get_memory_of_their_own(torch, source, tmp_path):
    tied, table = tensor(4), tensor(6, 2)
    torch.content = {"a": tied, "b": tied, "slice": Tensor(table.array[:2])}
    convert(source, tmp_path / "w.safetensors")
    arrays = load_file(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(arrays["a"], arrays["b"])
    np.testing.assert_array_equal(arrays["slice"], table.array[:2])


@pytest.mark.parametrize(
    "content, argv, parts",
    [
        ({"a": 1}, [], ["holds no tensors", "top level"]),
        ([1], [], ["holds a list"]),
        ({"ema": {"a": 1}}, ["--entry", "no"], ["entry='no'", "accepted: ema"]),
        (pickle.UnpicklingError("Unsupported global: os.system\nmore"), [], ["os.system"]),
        (EOFError(), [], ["EOFError"]),
    ],
)
def test_what_cannot_be_converted(content, argv, parts, torch, source, tmp_path, capsys):
    torch.content = content
    assert cli.main(["convert", str(source), str(tmp_path / "w.safetensors"), *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("qvg: error: ") and err.count("\n") == 1
    assert all(part in err for part in parts), err
    assert not (tmp_path / "w.safetensors").exists()


def test_names_that_are_not_accepted(torch, source, tmp_path, capsys):
    assert cli.main(["convert", str(source), str(tmp_path / "w.bin")]) == 2
    assert "give a name in .safetensors" in capsys.readouterr().err
    assert cli.main(["convert", str(tmp_path / "no.pt"), str(tmp_path / "w.safetensors")]) == 2
    assert "no.pt' is not a file" in capsys.readouterr().err
    torch.content = {"a": tensor(1)}
    assert cli.main(["convert", str(source), str(tmp_path / "no" / "w.safetensors")]) == 2
    assert str(tmp_path / "no") in capsys.readouterr().err


def test_without_pytorch_the_error_says_how_to_install_it(source, tmp_path, monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert cli.main(["convert", str(source), str(tmp_path / "w.safetensors")]) == 2
    assert "pip install 'qvg-jax[convert]'" in capsys.readouterr().err


class Odd(Tensor):
    """A tensor of a kind that has no plain values."""

    def __init__(self, **is_what):
        super().__init__(np.zeros(2, np.float32))
        self.__dict__.update(is_what)


class Expanded(Tensor):
    """A view of four bytes that says it has gigabytes."""

    def numel(self):
        return 3 * 2**30


def nested(depth):
    tree = {"x": tensor(1)}
    for _ in range(depth):
        tree = {"a": tree}
    return tree


CYCLE = {"x": 3}
CYCLE["a"] = CYCLE


@pytest.mark.parametrize(
    "content, parts",
    [
        ({"a": {"b": tensor(1)}, "a.b": tensor(1)}, ["two tensors", "'a.b'", "one of each name"]),
        ({1: tensor(1), "1": tensor(1)}, ["two tensors", "'1'"]),
        ({"__metadata__": tensor(1)}, ["'__metadata__'", "cannot have"]),
        ({"": tensor(1)}, ["''", "names of 1 to 512"]),
        ({"x" * 5000: tensor(1)}, ["names of 1 to 512"]),
        ({"\x1b[31m" * 200: tensor(1)}, ["\\x1b[31m", "names of 1 to 512"]),
        (nested(40), ["more than 32 deep"]),
        (nested(50_000), ["more than 32 deep"]),
        (CYCLE, ["more than 32 deep"]),
        ({"a": Odd(layout="torch.sparse_coo")}, ["'a'", "sparse_coo", "plain dense tensors"]),
        ({"a": Odd(is_quantized=True)}, ["quantized"]),
        ({"a": Odd(is_nested=True)}, ["nested"]),
        ({"a": Odd(device="meta")}, ["meta", "without values"]),
        ({"a": Odd(device="cuda:0")}, ["cuda:0"]),
        ({"a": Odd(dtype="torch.complex64")}, ["complex64"]),
        ({"a": Expanded(np.zeros(1, np.float32))}, ["repeats its memory"]),
        ("weights", ["holds a str"]),
        (None, ["holds a NoneType"]),
        ({}, ["holds no tensors"]),
        ({"model": {}}, ["holds no tensors in model"]),
    ],
    ids=range(20),
)
def test_odd_checkpoints(content, parts, torch, source, tmp_path, capsys):
    torch.content = content
    assert cli.main(["convert", str(source), str(tmp_path / "w.safetensors")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("qvg: error: ") and err.count("\n") == 1
    assert all(part in err for part in parts) and "\x1b" not in err
    assert {p.name for p in tmp_path.iterdir()} == {"w.pt"}


def test_nan_in_a_checkpoint_is_named(torch, source, tmp_path, capsys):
    bad = tensor(4)
    bad.array[1:3] = np.nan
    torch.content = {"fine": tensor(2), "spoiled": bad}
    assert cli.main(["convert", str(source), str(tmp_path / "w.safetensors")]) == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "1 tensors have NaN or Inf, the first is spoiled with 2" in err
    assert set(load_file(tmp_path / "w.safetensors")) == {"fine", "spoiled"}
