"""Untrusted pickles: no code is run."""

import copyreg
import os
import pickle
import random
import tracemalloc
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch._utils import _rebuild_parameter, _rebuild_tensor_v2

from forged_checkpoints import EDM, TRAINING_STATE, Call, Outside, pickled, unframed, write_zip
from relay_diffusion.checkpoints.published.edm import load_published, read_published
from relay_diffusion.checkpoints.published.unpickle import _STAND_INS, StoredTensor, open_checkpoint
from relay_diffusion.errors import UserError

SHELL = "touch {}"
PYTHON = "__import__('pathlib').Path({!r}).touch() or 7"


def _text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def _global(module, name):
    return f"c{module}\n{name}\n".encode()


ATTACKS = {  # name: (the pickle for a trap, the global that it is refused for)
    "reduce": (lambda trap: pickle.dumps(Call(os.system, SHELL.format(trap)), 2), "posix.system"),
    "stack_global": (lambda trap: pickle.dumps(Call(os.system, SHELL.format(trap)), 4), "posix.system"),
    "protocol_0": (lambda trap: b"\x80\x02" + pickle.dumps(Call(os.system, SHELL.format(trap)), 0), "posix.system"),
    "eval": (lambda trap: pickle.dumps(Call(eval, PYTHON.format(trap)), 4), "builtins.eval"),
    "exec": (lambda trap: pickle.dumps(Call(exec, PYTHON.format(trap)), 5), "builtins.exec"),
    "getattr": (
        lambda trap: b"\x80\x02" + _global("builtins", "getattr") + _global("builtins", "__import__") + _text("os")
        + b"\x85R" + _text("system") + b"\x86R" + _text(SHELL.format(trap)) + b"\x85R.",
        "builtins.getattr",
    ),
    "newobj": (
        lambda trap: b"\x80\x02" + _global("builtins", "bytes") + _global("builtins", "map")
        + _global("builtins", "eval") + b"](" + _text(PYTHON.format(trap)) + b"e\x86\x81\x85\x81.",
        "builtins.bytes",
    ),
    "inst": (lambda trap: b"\x80\x02(" + _text(SHELL.format(trap)) + b"iposix\nsystem\n.", "posix.system"),
    "obj": (lambda trap: b"\x80\x02(" + _global("os", "system") + _text(SHELL.format(trap)) + b"o.", "os.system"),
    "build": (
        lambda trap: b"\x80\x02" + _global("collections", "OrderedDict") + b")R}" + _text("__setstate__")
        + _global("os", "system") + b"sb" + _text(SHELL.format(trap)) + b"b.",
        "os.system",
    ),
}  # fmt: skip


@pytest.fixture
def trap(tmp_path):
    return tmp_path / "executed"


def content_of(path):
    """Read a file's dictionary, with its tensors."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return value.read() if isinstance(value, StoredTensor) else value

    with open_checkpoint(path) as content:
        return plain(content)


def refused(path):
    """Return the one-line error for a file, without the file's name."""
    with pytest.raises(UserError):
        load_published(path)
    with pytest.raises(UserError) as caught:
        content_of(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_is_run(name, trap, tmp_path):
    make, named = ATTACKS[name]
    attack = make(str(trap))
    pickle.loads(attack)
    assert trap.exists()  # Python's unpickler runs it
    trap.unlink()

    (tmp_path / "plain.pkl").write_bytes(attack)
    write_zip(tmp_path / "zipped.pt", attack)
    inner = torch.storage._load_from_bytes
    (tmp_path / "nested.pkl").write_bytes(pickled({"ema": 1, "loss_fn": Call(inner, attack)}, 4))
    for path in ("plain.pkl", "zipped.pt", "nested.pkl"):
        if (name, path) == ("build", "nested.pkl"):
            named = "collections.OrderedDict"  # a storage has no use even for that
        message = refused(tmp_path / path)
        assert (
            f"names {named}, which checkpoints do not use: fetch a published checkpoint; no code in it ran" in message
        )
    assert not trap.exists()


def test_stored_source_is_not_run(trap, tmp_path):
    source = f"open({str(trap)!r}, 'w').close()\nclass EDMPrecond: pass\n"
    content = unframed(EDM.read_bytes())
    old = b"\x8c\x11# source removed\n"
    assert old in content
    path = tmp_path / "source.pkl"
    path.write_bytes(content.replace(old, b"X" + len(source).to_bytes(4, "little") + source.encode()))
    load_published(path)
    assert not trap.exists()


def test_extension_codes_are_not_looked_up(trap, tmp_path):
    copyreg.add_extension("posix", "system", 240)
    try:
        attack = pickle.dumps(Call(os.system, SHELL.format(trap)), 2)
        pickle.loads(attack)
        assert trap.exists()
        trap.unlink()
        (tmp_path / "extension.pkl").write_bytes(attack)
        assert "opcode EXT1" in refused(tmp_path / "extension.pkl")
    finally:
        copyreg.remove_extension("posix", "system", 240)
    assert not trap.exists()


def test_a_known_global_is_not_touched_either(tmp_path):
    # BUILD with (None, {...}) sets attributes of whatever lies on the stack: here of torch's function
    attack = b"\x80\x02" + _global("torch._utils", "_rebuild_tensor_v2") + b"N}" + _text("spoiled") + b"K\x01s\x86b."
    (tmp_path / "build.pkl").write_bytes(attack)
    refused(tmp_path / "build.pkl")
    assert not hasattr(_rebuild_tensor_v2, "spoiled")
    pickle.loads(attack)
    assert hasattr(_rebuild_tensor_v2, "spoiled")
    del _rebuild_tensor_v2.spoiled


def test_names_in_messages_are_one_printable_line(tmp_path):
    path = tmp_path / "odd.pkl"
    path.write_bytes(b"\x80\x04\x8c\x04a\n\x1b[\x8c\x01b\x93.")
    assert "names a\\n\\x1b[.b," in refused(path)


BOMBS = {
    "put": b"\x80\x02}r\xff\xff\xff\xff.",
    "text": b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"abc.",
    "bytes": b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"abc.",
    "number": b"\x80\x02\x8b" + (2**31 - 1).to_bytes(4, "little") + b"abc.",
    "buffer": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"abc.",
    "frame": b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"}.",
    "memo": b"\x80\x02}" + b"(" * 5 + b"r\x00\x00\x00\x01" + b"t" * 5 + b".",
    "keys": b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.",
    "deep_element": b"\x80\x04\x8f()" + b"\x85" * 300_000 + b"\x90.",
    "doubled_key": b"\x80\x02})q\x00" + b"h\x00h\x00\x86q\x00" * 90 + b"(h\x00K\x01u.",
    "across_a_frame": b"\x80\x04\x95" + (4).to_bytes(8, "little") + b"}X\x04\x00\x00\x00aaaa0.",
    "marks_again": b"\x80\x02" + b"N" * 100_000 + b"(0" * 100_000 + b"(t0.",
    "deep": b"\x80\x02}" + _text("ema") + b")" + b"\x85" * 30_000 + b"s.",
    "doubled": b"\x80\x02}" + _text("ema") + b"]q\x00" + b"](h\x00h\x00eq\x00" * 90 + b"s.",
    "cycle": b"\x80\x02}" + _text("ema") + b"]q\x00h\x00as.",
    "marks": b"\x80\x02" + b"(" * 30_000,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_small_files_take_little_memory(name, tmp_path):
    path = tmp_path / "bomb.pkl"
    path.write_bytes(BOMBS[name])
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"bomb\.pkl"):
            load_published(path)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def stand_in_attributes():
    return {name: {key: getattr(kind, key, None) for key in dir(kind)} for name, kind in _STAND_INS.items()}


@pytest.mark.parametrize("name", _STAND_INS)
@pytest.mark.parametrize("state", ["N}X\x01\0\0\0aK\x01s\x86", "}X\x0a\0\0\0__setstate__K\x01s", "N"])
def test_stand_ins_keep_no_state(name, state, tmp_path):
    """BUILD, with a plain or a slot state, changes no stand-in; neither do items."""
    before = stand_in_attributes()
    for end in (state.encode() + b"b.", b"K\x01K\x02s.", b"K\x01a.", b")Rb."):
        path = tmp_path / "state.pkl"
        path.write_bytes(b"\x80\x02" + _global(*name) + end)
        refused(path)
    assert stand_in_attributes() == before


@pytest.mark.parametrize("name", ["dict.fromkeys", "OrderedDict.__init__", "OrderedDict.fromkeys", "_Mapping"])
def test_names_are_not_looked_up(name, tmp_path):
    """A dotted name of protocol 4 is one name, not attributes of a known one."""
    path = tmp_path / "dotted.pkl"
    path.write_bytes(b"\x80\x04" + _text("collections") + _text(name) + b"\x93)R.")
    assert f"names collections.{name}," in refused(path)


@pytest.mark.parametrize("opcodes", [b"}2.", b"]N\x92.", b"(N\x91.", b"cbuiltins\nset\n)}\x92.", b"\x97.", b"I1\n."])
def test_other_opcodes_are_refused(opcodes, tmp_path):
    path = tmp_path / "opcode.pkl"
    path.write_bytes(b"\x80\x05" + opcodes)
    assert "is not used by checkpoints" in refused(path)


def test_a_compressed_member_is_not_unpacked(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N" * 10_000_000)
    assert "compressed" in refused(path)


def test_plain_values_are_read(tmp_path):
    numbers = [np.float64(0.1), np.float32(0.5), np.int64(-3), np.int32(7), np.bool_(True), np.uint8(200)]
    values = {"a": [1, -2, 2**40, 0.5, None, True, "text", b"\xff\x00"], "t": (1, (2,)), "s": {"x", "y"}, "n": numbers}
    values["o"] = OrderedDict(k=OrderedDict(b=1, a=2))
    for protocol in (2, 3, 4, 5):
        path = tmp_path / "values.pkl"
        path.write_bytes(pickle.dumps({"ema": values, "other": 1}, protocol))
        entries = content_of(path)
        assert entries == {"ema": values, "other": 1}
        assert [type(n) for n in entries["ema"]["n"]] == [float, float, int, int, bool, int]
        assert list(entries["ema"]["o"]["k"]) == ["b", "a"]


def test_numpy_values_must_be_numbers_of_their_size(tmp_path):
    scalar, dtype = np._core.multiarray.scalar, np.dtype
    state = (3, "<", None, None, None, -1, -1, 0)
    path = tmp_path / "number.pkl"
    for code, content, good in (("f8", bytes(8), True), ("f8", bytes(7), False), ("O8", bytes(8), False)):
        number = Call(scalar, Call(dtype, code, False, True, state=state), content)
        path.write_bytes(pickled({"ema": number}, 4))
        if good:
            assert content_of(path) == {"ema": 0.0}
        else:
            refused(path)


def _tensor(offset, size, stride, count=6, kind=torch.FloatStorage, key="0", location="cuda:0"):
    storage = Outside(("storage", kind, key, location, count))
    return Call(_rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())


def test_tensors_are_read(tmp_path):
    content = torch.arange(6.0).numpy().tobytes()
    tensors = {
        "t": _tensor(1, (2, 2), (1, 2)),
        "p": Call(_rebuild_parameter, _tensor(0, (6,), (1,)), True, OrderedDict()),
    }
    tensors["half"] = _tensor(0, (12,), (1,), 12, torch.HalfStorage)
    path = write_zip(tmp_path / "tensors.pt", pickled({"ema": tensors}), **{"0": content})
    read = content_of(path)["ema"]
    assert read["t"].tolist() == [[1.0, 3.0], [2.0, 4.0]]
    assert read["p"].tolist() == [0, 1, 2, 3, 4, 5]
    assert read["half"].dtype == torch.float16
    read["t"].zero_()  # memory of its own, not the file's


@pytest.mark.parametrize(
    "tensor",
    [
        _tensor(0, (7,), (1,)),
        _tensor(1, (6,), (1,)),
        _tensor(-1, (2,), (1,)),
        _tensor(5, (2,), (-1,)),
        _tensor(0, (2, 2), (1, 6)),
        _tensor(0, (2**40,), (0,)),
        _tensor(0, (0, 2**60), (1, 1)),
        _tensor(0, (2,), (1, 1)),
        _tensor(0, (6,), (1,), 7),
        _tensor(0, (6,), (1,), -6),
        _tensor(0, (6,), (1,), 6, torch.DoubleStorage),
        _tensor(0, (6,), (1,), 6, torch.FloatStorage, "1"),
        _tensor(0, (6,), (1,), 6, torch.FloatStorage, "../0"),
    ],
)
def test_a_tensor_must_lie_within_its_storage(tmp_path, tensor):
    refused(write_zip(tmp_path / "bad.pt", pickled({"ema": tensor}), **{"0": bytes(24)}))


def test_only_requested_tensors_are_read(monkeypatch):
    read, total = [], len(zipfile.ZipFile(TRAINING_STATE).namelist())
    original = zipfile.ZipFile.read
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda self, name: read.append(name) or original(self, name))
    load_published(TRAINING_STATE)
    assert 50 < len(read) < total / 3  # neither the optimizer nor the raw weights


def _survives(path, content):
    """Return whether a file with this content is read; otherwise check its one-line error."""
    path.write_bytes(content)
    try:
        read_published(path)
    except UserError as error:
        message = str(error)
    else:
        return True
    assert "\n" not in message
    assert str(path) in message
    return False


@pytest.mark.parametrize("source", [EDM, TRAINING_STATE], ids=["pkl", "pt"])
def test_truncated_files_are_refused(source, tmp_path):
    content = source.read_bytes()
    last = len(content) - 1
    positions = np.unique(np.concatenate([np.geomspace(1, last, 140), np.linspace(1, last, 80)]).astype(int))
    for position in [0, *positions.tolist()]:
        assert not _survives(tmp_path / f"cut{source.suffix}", content[:position]), position


def _flipped(content, first, last, seed):
    """Flip one bit in content[first:last], or thirty bits in one case of three."""
    generator, changed = random.Random(seed), bytearray(content)
    for _ in range(1 if seed % 3 else 30):
        changed[generator.randrange(first, last)] ^= 1 << generator.randrange(8)
    return bytes(changed)


@pytest.mark.slow
def test_files_with_flipped_bits_are_refused_or_read(tmp_path):
    pickle_file, zip_file = EDM.read_bytes(), TRAINING_STATE.read_bytes()
    size = len(zip_file)
    # the first part of the pickle: its weights come later; the end of the zip: there lies the directory
    pickles = [_survives(tmp_path / "flipped.pkl", _flipped(pickle_file, 0, 70_000, seed)) for seed in range(40)]
    zips = [_survives(tmp_path / "flipped.pt", _flipped(zip_file, size - 80_000, size, seed)) for seed in range(20)]
    for results in (pickles, zips):
        assert 0 < sum(results) < len(results)


def test_flipped_bits_with_a_valid_checksum_are_refused_or_read(tmp_path):
    with zipfile.ZipFile(TRAINING_STATE) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    storages = {name.removeprefix("data/"): content for name, content in members.items() if name.startswith("data/")}
    content = members["data.pkl"]
    for seed in range(15):
        path = write_zip(tmp_path / "source.pt", _flipped(content, 0, len(content), seed), **storages)
        _survives(path, path.read_bytes())
