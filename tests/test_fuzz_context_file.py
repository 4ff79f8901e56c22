"""Damaged, hostile and changing cache files: a ValueError or a correct read, no crash, no memory beyond them."""

import json
import os
import struct
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from modeling_xcllama import ContextCache, context_file

FINGERPRINT = "f" * 64
SHAPES = {"hidden": {"hidden": (9, 64)}, "condensed": {"key": (9, 2, 64), "value": (9, 2, 64)}}
KINDS = [(layout, dtype) for layout in SHAPES for dtype in ("float32", "bfloat16", "float16", "int8", "int4")]
SETTINGS = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def build_cache(layout="hidden", dtype="float32", seed=0) -> ContextCache:
    generator = torch.Generator().manual_seed(seed)
    states = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES[layout].items()}
    ids = torch.arange(9, dtype=torch.int32)
    cache = ContextCache(states, (0, 4, 9), ids, FINGERPRINT).join([[0], [1, 0], []])
    return cache.quantize(dtype) if dtype.startswith("int") else cache.to(dtype=getattr(torch, dtype))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The bytes of a valid file of every kind."""
    folder = tmp_path_factory.mktemp("valid")
    for layout, dtype in KINDS:
        build_cache(layout, dtype).save(folder / f"{layout}-{dtype}")
    return {kind: (folder / "-".join(kind)).read_bytes() for kind in KINDS}


def split(data: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def merge(header: dict, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def attempt(path, data: bytes, verify: bool = False) -> ContextCache | None:
    """Load `data`: None where it is refused with a ValueError; what is read must hang together."""
    path.write_bytes(data)
    try:
        cache = ContextCache.load(path, verify=verify)
    except ValueError:
        return None
    total = cache.offsets[-1]
    for state in cache.states.values():
        assert state.shape[0] == total
    assert len(cache.token_ids) == total
    assert cache.nbytes <= len(data)
    assert sum(cache.lengths) <= total * max(1, len(data))
    for row in range(len(cache)):
        assert len(cache.row_token_ids(row)) == cache.lengths[row]
    return cache


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_valid_files_are_read_exactly(files, tmp_path, kind):
    for verify in (True, False):
        loaded, cache = attempt(tmp_path / "cache", files[kind], verify), build_cache(*kind)
        assert loaded.rows == cache.rows
        assert loaded.offsets == cache.offsets
        for name, state in cache.states.items():
            ours = (state,) if isinstance(state, torch.Tensor) else state.tensors()
            theirs = loaded.states[name]
            theirs = (theirs,) if isinstance(theirs, torch.Tensor) else theirs.tensors()
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@SETTINGS
@given(kind=st.sampled_from(KINDS), cut=st.floats(0, 0.9999))
def test_truncated(files, tmp_path, kind, cut):
    data = files[kind]
    for verify in (True, False):
        assert attempt(tmp_path / "cache", data[: int(len(data) * cut)], verify) is None


@SETTINGS
@given(
    kind=st.sampled_from(KINDS),
    flips=st.lists(st.tuples(st.floats(0, 0.9999), st.integers(0, 7)), min_size=1, max_size=4, unique=True),
)
def test_bit_flips(files, tmp_path, kind, flips):
    """With its checksum verified no altered file is read; without, what is read still hangs together."""
    data = bytearray(files[kind])
    for where, bit in flips:
        data[int(where * len(data))] ^= 1 << bit
    attempt(tmp_path / "cache", bytes(data))
    verified = attempt(tmp_path / "cache", bytes(data), verify=True)
    if verified is not None:
        # flips that cancel out, or that only change how the header is written
        assert data == files[kind] or split(bytes(data)) == split(files[kind])


@SETTINGS
@given(kind=st.sampled_from(KINDS), tail=st.binary(min_size=1, max_size=64))
def test_bytes_behind_the_end(files, tmp_path, kind, tail):
    assert attempt(tmp_path / "cache", files[kind] + tail) is None


@SETTINGS
@given(data=st.binary(max_size=300), length=st.integers(0, 2**64 - 1))
def test_arbitrary_bytes(tmp_path, data, length):
    assert attempt(tmp_path / "cache", data) is None
    assert attempt(tmp_path / "cache", struct.pack("<Q", length) + data) is None


HEADER_VALUES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["hidden", "condensed", "int8", "int4", "float32", "1", "2", "-1"]),
)


@SETTINGS
@given(
    kind=st.sampled_from(KINDS),
    field=st.sampled_from(["format", "format_version", "layout", "dtype", "fingerprint", "checksum"]),
    value=st.none() | HEADER_VALUES,
)
def test_header_fields(files, tmp_path, kind, field, value):
    header, body = split(files[kind])
    original = header["__metadata__"].pop(field)
    if value is not None:
        header["__metadata__"][field] = value
    cache = attempt(tmp_path / "cache", merge(header, body))
    if field != "checksum" and value != original:
        assert attempt(tmp_path / "cache", merge(header, body), verify=True) is None
    if cache is not None:
        # floating-point states are read in every version
        older = field == "format_version" and value == "1"
        assert older or field in ("fingerprint", "checksum") or value == original


SIZES = st.one_of(st.integers(0, 70), st.sampled_from([2**31, 2**47, 2**62, 2**63 - 1, 2**63, 2**64]))


@SETTINGS
@given(
    kind=st.sampled_from(KINDS),
    which=st.integers(0, 7),
    dtype=st.none()
    | st.sampled_from(["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "U64"]),
    shape=st.none() | st.lists(SIZES, max_size=4),
    offsets=st.none() | st.tuples(SIZES, SIZES),
)
def test_tensor_entries(files, tmp_path, kind, which, dtype, shape, offsets):
    """Other dtypes, shapes of any size, and spans that overlap, lie outside the file or run backwards."""
    header, body = split(files[kind])
    names = sorted(name for name in header if name != "__metadata__")
    entry = header[names[which % len(names)]]
    before = dict(entry)
    entry |= {k: v for k, v in (("dtype", dtype), ("shape", shape), ("data_offsets", offsets)) if v is not None}
    cache = attempt(tmp_path / "cache", merge(header, body))
    changed = (before["dtype"], before["shape"], list(before["data_offsets"])) != (
        entry["dtype"],
        entry["shape"],
        list(entry["data_offsets"]),
    )
    if changed:
        assert attempt(tmp_path / "cache", merge(header, body), verify=True) is None
    else:
        assert cache is not None


@SETTINGS
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_offsets_and_rows(files, tmp_path, kind, data):
    """Valid files with numbers that do not fit: refused, or a cache whose rows lie in it."""
    numbers = st.lists(st.integers(-3, 12) | st.sampled_from([2**31, -(2**63), 2**63 - 1]), max_size=6)
    ContextCache.load(_write(tmp_path, files[kind]))
    header, _ = split(files[kind])
    tensors = _tensors(tmp_path / "cache")
    name = data.draw(st.sampled_from(["offsets", "rows", "row_offsets", "token_ids"]))
    kind_of = data.draw(st.sampled_from([torch.int64, torch.int32, torch.float32, torch.bool]))
    values = torch.tensor(data.draw(numbers), dtype=torch.int64)
    tensors[name] = values.to(kind_of) if kind_of != torch.int64 else values
    if data.draw(st.booleans()):
        tensors[name] = tensors[name][None]
    save_file(tensors, tmp_path / "changed", metadata=header["__metadata__"])
    attempt(tmp_path / "again", (tmp_path / "changed").read_bytes())


def _write(folder, data):
    (folder / "cache").write_bytes(data)
    return folder / "cache"


def _tensors(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}


@pytest.mark.parametrize("shift", [0, 4, -4])
def test_overlapping_tensors(files, tmp_path, shift):
    """Two tensors on the same bytes, or partly: refused, with the bytes in between there or left out."""
    header, body = split(files["condensed", "float32"])
    start, end = header["key"]["data_offsets"]
    header["value"]["data_offsets"] = [start + shift, end + shift]
    packed = json.loads(json.dumps(header))
    others = [name for name in header if name not in ("__metadata__", "key", "value")]
    parts, position = [body[start:end]], end - start
    packed["key"]["data_offsets"] = [0, position]
    packed["value"]["data_offsets"] = [max(0, shift), max(0, shift) + position]
    for name in others:
        first, last = header[name]["data_offsets"]
        packed[name]["data_offsets"] = [position, position + last - first]
        parts.append(body[first:last])
        position += last - first
    for data in (merge(header, body), merge(packed, b"".join(parts))):
        for verify in (True, False):
            assert attempt(tmp_path / "cache", data, verify) is None


def test_the_error_names_the_file(files, tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path / "cache")):
        ContextCache.load(_write(tmp_path, files["hidden", "int8"][:-1]))


def test_missing_and_additional_tensors(files, tmp_path):
    for kind, data in files.items():
        header, _ = split(data)
        _write(tmp_path, data)
        tensors = _tensors(tmp_path / "cache")
        for name in tensors:
            rest = {other: tensor for other, tensor in tensors.items() if other != name}
            save_file(rest, tmp_path / "changed", metadata=header["__metadata__"])
            assert attempt(tmp_path / "again", (tmp_path / "changed").read_bytes()) is None, (kind, name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(files, tmp_path, bad):
    for kind, name in ((("hidden", "float32"), "hidden"), (("condensed", "int8"), "value.scale")):
        header, _ = split(files[kind])
        _write(tmp_path, files[kind])
        tensors = _tensors(tmp_path / "cache")
        tensors[name].view(-1)[3] = bad
        save_file(tensors, tmp_path / "changed", metadata=header["__metadata__"])
        assert attempt(tmp_path / "again", (tmp_path / "changed").read_bytes()) is None


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    torch.save({"hidden": Bomb()}, tmp_path / "pickle")
    with pytest.raises(ValueError, match="no safetensors file"):
        ContextCache.load(tmp_path / "pickle")
    assert not (tmp_path / "exploded").exists()


HUGE = """
import json, resource, struct, sys
from modeling_xcllama import ContextCache
path, data = sys.argv[1], open(sys.argv[2], "rb").read()
length, = struct.unpack("<Q", data[:8])
header, body = json.loads(data[8:8 + length]), data[8 + length:]
ContextCache.load(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
refused = 0
for name in [key for key in header if key != "__metadata__"]:
    for size in (2**31, 2**40, 2**61):
        for shape in ([size], [size, 64], [0, size], [size, 0, size], [size, 2, 64]):
            for end in (size, header[name]["data_offsets"][1]):
                changed = json.loads(json.dumps(header))
                changed[name] |= {"shape": shape, "data_offsets": [header[name]["data_offsets"][0], end]}
                text = json.dumps(changed).encode()
                for claimed in (len(text), 2**40):
                    with open(path, "wb") as file:
                        file.write(struct.pack("<Q", claimed) + text + body)
                    for verify in (True, False):
                        try:
                            ContextCache.load(path, verify=verify)
                        except ValueError:
                            refused += 1
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(refused, after - before)
"""


def test_huge_declared_sizes_take_no_memory(files, tmp_path):
    """In a process of its own: its peak memory in KiB does not grow with what the files declare."""
    (tmp_path / "valid").write_bytes(files["hidden", "float32"])
    command = [sys.executable, "-c", HUGE, str(tmp_path / "cache"), str(tmp_path / "valid")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    refused, grown = map(int, done.stdout.split())
    assert refused == 5 * 3 * 5 * 2 * 2 * 2
    assert grown < 32 * 1024


def test_reader_while_the_file_is_replaced(tmp_path):
    """Readers see the old file or the new one; what they mapped stays as it was."""
    path = tmp_path / "cache"
    caches = [build_cache(seed=seed) for seed in range(2)]
    caches[0].save(path)
    first, failures, seen, stop = ContextCache.load(path), [], set(), threading.Event()

    def read():
        while not stop.is_set():
            try:
                loaded = ContextCache.load(path)
                match = [torch.equal(loaded.states["hidden"], cache.states["hidden"]) for cache in caches]
                assert sum(match) == 1
                seen.add(match.index(True))
            except Exception as error:
                failures.append(error)
                return

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for turn in range(1000):
        caches[(turn + 1) % 2].save(path)
        if turn >= 60 and len(seen) == 2:
            break
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures
    assert seen == {0, 1}
    assert torch.equal(first.states["hidden"], caches[0].states["hidden"])
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


def test_a_file_that_is_replaced_during_every_read(tmp_path, monkeypatch):
    """Whether the read itself fails or not, it ends after a bounded number of turns."""
    path = tmp_path / "cache"
    build_cache().save(path)
    read_once, reads = context_file._read_once, []

    def read_while_replaced(*arguments):
        result = read_once(*arguments)
        reads.append(result)
        build_cache(seed=len(reads) % 2).save(path)
        if len(reads) % 2:
            raise ValueError("truncated")
        return result

    monkeypatch.setattr(context_file, "_read_once", read_while_replaced)
    monkeypatch.setattr(context_file, "MAX_READS", 7)
    with pytest.raises(ValueError, match="was replaced during each of 7 reads; load it when its writer is done"):
        ContextCache.load(path)
    assert len(reads) == 7


def test_concurrent_readers_share_one_mapping(tmp_path):
    path = tmp_path / "cache"
    cache = build_cache()
    cache.save(path)
    results = [None] * 8

    def read(index):
        results[index] = ContextCache.load(path)

    threads = [threading.Thread(target=read, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for loaded in results:
        assert torch.equal(loaded.states["hidden"], cache.states["hidden"])
        assert loaded.memory_report().mapped_bytes == loaded.memory_report().state_bytes
