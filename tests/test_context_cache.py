import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_xcllama import ContextCache


def make_cache(lengths=(3, 0, 5), width=8, dtype=torch.float32, condensed=False, fingerprint="f" * 64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    if condensed:
        states = {name: torch.randn(total, 2, width, generator=generator).to(dtype) for name in ("key", "value")}
    else:
        states = {"hidden": torch.randn(total, width, generator=generator).to(dtype)}
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    return ContextCache(states, offsets, torch.arange(total, dtype=torch.int32), fingerprint)


def same(first: ContextCache, second: ContextCache) -> bool:
    equal = all(torch.equal(first.states[name], second.states[name]) for name in first.states)
    return equal and (first.offsets, first.rows, first.fingerprint) == (
        second.offsets,
        second.rows,
        second.fingerprint,
    )


def test_sizes():
    cache = make_cache()
    assert (len(cache), cache.lengths, cache.num_tokens) == (3, [3, 0, 5], 8)
    assert (cache.layout, cache.dtype) == ("hidden", torch.float32)
    assert (cache.bytes_per_token, cache.nbytes) == (32, 256)
    condensed = make_cache(condensed=True, dtype=torch.bfloat16)
    assert (condensed.layout, condensed.bytes_per_token) == ("condensed", 64)


def test_select_and_join_share_storage():
    cache = make_cache()
    chosen = cache.select([2, 0, 0])
    assert chosen.lengths == [5, 3, 3]
    assert chosen.states is cache.states
    joined = cache.join([[2, 0], [], [0, 0]])
    assert joined.lengths == [8, 0, 6]
    assert joined.states is cache.states
    assert joined.row_token_ids(0).tolist() == [3, 4, 5, 6, 7, 0, 1, 2]
    assert joined.join([[1, 0]]).rows == ((2, 0),)
    # each document counts once
    assert cache.select([0, 0]).nbytes == 3 * 32


def test_concat():
    first, second = make_cache(), make_cache((2, 4), seed=1)
    joined = ContextCache.concat([first.select([2]), second])
    assert joined.lengths == [5, 2, 4]
    assert joined.row_token_ids(1).tolist() == [0, 1]
    # rows of one storage need no copy
    assert ContextCache.concat([first.select([0]), first.select([2])]).states is first.states


@pytest.mark.parametrize("other", [{"dtype": torch.bfloat16}, {"condensed": True}, {"fingerprint": "e" * 64}])
def test_concat_refuses_mixtures(other):
    with pytest.raises(ValueError, match="must have one"):
        ContextCache.concat([make_cache(), make_cache(**other)])


def test_to():
    cache = make_cache()
    assert cache.to("cpu") is cache
    half = cache.to(dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.nbytes * 2 == cache.nbytes
    with pytest.raises(ValueError, match="torch.int8 cache cannot be converted"):
        cache.quantize("int8").to(dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("condensed", [False, True], ids=["hidden", "condensed"])
def test_save_and_load(tmp_path, dtype, condensed):
    cache = make_cache(dtype=dtype, condensed=condensed)
    cache.save(tmp_path / "c.safetensors")
    loaded = ContextCache.load(tmp_path / "c.safetensors")
    assert same(cache, loaded)
    assert torch.equal(cache.token_ids, loaded.token_ids)
    # nothing but the file: no partial file is left
    assert os.listdir(tmp_path) == ["c.safetensors"]


def test_rows_are_saved_without_what_they_do_not_read(tmp_path):
    cache = make_cache().join([[2, 2], []])
    cache.save(tmp_path / "c")
    loaded = ContextCache.load(tmp_path / "c")
    assert loaded.lengths == [10, 0]
    assert loaded.offsets == (0, 5)
    assert torch.equal(loaded.row_token_ids(0), cache.row_token_ids(0))


def test_states_are_mapped_not_copied(tmp_path):
    make_cache((4096,), width=512).save(tmp_path / "c")
    cache = ContextCache.load(tmp_path / "c")
    address = cache.states["hidden"].data_ptr()
    maps = [line.split() for line in open("/proc/self/maps") if line.rstrip().endswith(str(tmp_path / "c"))]
    spans = [tuple(int(part, 16) for part in line[0].split("-")) for line in maps]
    assert any(start <= address < end for start, end in spans)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    make_cache().save(tmp_path / "c")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        make_cache(seed=5).save(tmp_path / "c")
    assert os.listdir(tmp_path) == ["c"]
    assert same(ContextCache.load(tmp_path / "c"), make_cache())


def rewrite(path, change_tensors=None, **header):
    """Write a cache file again with other tensors or header fields, checksum and all as they were."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    metadata = json.loads(raw[8 : 8 + size])["__metadata__"] | header
    tensors = load_file(path)
    if change_tensors:
        change_tensors(tensors)
    save_file(tensors, path, metadata=metadata)


def test_damaged_files(tmp_path):
    path = tmp_path / "c"
    make_cache().save(path)
    good = path.read_bytes()
    path.write_bytes(good[:-10])
    with pytest.raises(ValueError, match="truncated"):
        ContextCache.load(path)
    path.write_bytes(good[:-3] + b"\x01\x02\x03")
    with pytest.raises(ValueError, match="checksum"):
        ContextCache.load(path)
    path.write_bytes(good)
    rewrite(path, fingerprint="0" * 64)
    with pytest.raises(ValueError, match="checksum"):
        ContextCache.load(path)
    path.write_bytes(good)
    rewrite(path, format_version="3")
    with pytest.raises(ValueError, match="format version 3, this code reads up to 2"):
        ContextCache.load(path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="no context cache"):
        ContextCache.load(path)
    path.write_bytes(b"not a safetensors file at all")
    with pytest.raises(ValueError, match="truncated, or no safetensors"):
        ContextCache.load(path)
    with pytest.raises(FileNotFoundError, match="no context cache at"):
        ContextCache.load(tmp_path / "absent")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.update(hidden=torch.full((8, 8), torch.nan)), "NaN"),
        (lambda tensors: tensors.update(offsets=torch.tensor([0, 3, 2, 8])), "never decrease"),
        (lambda tensors: tensors.update(rows=torch.tensor([0, 1, 9])), "must name documents"),
        (lambda tensors: tensors.update(token_ids=torch.arange(3)), "must have 8 tokens"),
        (lambda tensors: tensors.pop("offsets"), "offsets"),
        (lambda tensors: tensors.update(hidden=torch.zeros(8, 2, 4)), "dimensions"),
    ],
)
def test_unverified_files_are_still_checked(tmp_path, change, message):
    path = tmp_path / "c"
    make_cache().save(path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        ContextCache.load(path, verify=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda cache: cache.select([3]), r"\[0, 2\], got 3"),
        (lambda cache: cache.select([-1]), "got -1"),
        (lambda cache: cache.join([[0], [7]]), "got 7"),
        (lambda cache: cache.select([]), "empty list"),
        (lambda cache: ContextCache.concat([]), "empty list"),
        (lambda cache: cache.quantize("int2"), "'int8', 'int4', got 'int2'"),
        (lambda cache: cache.quantize("int8").quantize("int4"), "already"),
        (lambda cache: ContextCache({"other": cache.token_ids}, (0, 8), cache.token_ids, ""), "'hidden' or 'key'"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_cache())
