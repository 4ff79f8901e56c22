"""Fuzz what is read as JSON or given as an index: manifests of snapshots, configs of models, rows of caches.

    python scripts/fuzz_inputs.py --seconds 120 --output results/fuzz_inputs.json

Each input is a valid one of which something was changed. It is refused with a ValueError (an index that is no integer,
a field that is none: TypeError), or what comes out hangs together; anything else ends the run with an error and says
the seed that makes it again: `--seed N --count 1 --only KIND`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy
import torch
from huggingface_hub.errors import StrictDataclassError

from modeling_xcllama import ContextCache, XCLlamaConfig, XCLlamaForCausalLM
from xcllama.provenance import write_result
from xcllama.store.manifest import FileEntry, Manifest

MEASURED = ("modeling_xcllama", "xcllama/store/manifest.py", "scripts/fuzz_inputs.py")
NAMES = ("shards/a.safetensors", "../a", "/etc/passwd", "shards/../a.safetensors", "shards/.a.safetensors", "a\0", "")
VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 1.0, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "1", "a", "block", "joint", "tanh", "scalar", "rms_norm", "\ud800", [], [0], [0, 1], [1, 0], [3], [-1]),
    *([1.5], ["0"], [None], [True], {}, {"a": 1}, {"model_type": "bert"}, [[0]], NAMES[1]),
)
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def change(value: object, random: Random) -> object:
    """JSON of which one place has another value, is gone, or is there twice."""
    if isinstance(value, dict) and value and random.random() < 0.8:
        changed, key = dict(value), random.choice(sorted(value, key=str))
        action = random.random()
        if action < 0.1:
            del changed[key]
        elif action < 0.2:
            changed[random.choice(("format", "x", "", key + "s"))] = random.choice(VALUES)
        else:
            changed[key] = change(value[key], random)
        return changed
    if isinstance(value, list) and value and random.random() < 0.8:
        place = random.randrange(len(value))
        return [*value[:place], change(value[place], random), *value[place:]]
    return random.choice((*VALUES, *NAMES))


def manifest(random: Random) -> bool:
    """A manifest is read as one whose files lie in their snapshot."""
    files = [FileEntry(f"{kind}/{i}", 5, "0" * 64, "00") for kind, i in (("shards", "a.safetensors"),)]
    parts = [FileEntry("catalogue/p.parquet", 5, "0" * 64)]
    found = json.loads(Manifest("f", "{}", "float32", "1", "n", "m", 1, 2, files, parts).to_json())
    for _ in range(random.randrange(1, 4)):
        found = change(found, random)
    text = json.dumps(found)
    if random.random() < 0.2:
        place = random.randrange(len(text))
        text = text[:place] + random.choice(('"', "{", "]", "\0", "9" * 400, "")) + text[place + random.randrange(3) :]
    try:
        read = Manifest.from_json(text.encode(errors="surrogatepass") if random.random() < 0.5 else text, "here")
    except ValueError:
        return False
    for entry in read.files:
        folder, _, name = entry.name.partition("/")
        if folder not in ("shards", "catalogue") or "/" in name or "\\" in name or name.startswith(".") or not name:
            raise RuntimeError(f"a file {entry.name!r}")
        if type(entry.nbytes) is not int or entry.nbytes < 0:
            raise RuntimeError(f"a size {entry.nbytes!r}")
    return True


def config(random: Random) -> bool:
    """A config is refused, or makes a model whose caches it reads."""
    fields = XCLlamaConfig(**SIZES, cross_attention_layers=[1, 2]).to_dict()
    own = [name for name in fields if name.startswith(("cross_attention_", "context_", "encoder_", "answer_"))]
    for name in random.sample(own, random.randrange(1, 4)):
        fields[name] = change(fields.get(name), random)
    # sizes that would only take memory
    if any(isinstance(value, int) and abs(value) > 2**20 for value in fields.values()):
        return False
    try:
        made = XCLlamaConfig.from_dict(fields)
        model = XCLlamaForCausalLM(made).eval()
        ids = torch.arange(3, 8)[None]
        cache = model.encode_context(ids)
        logits = model(ids, context_cache=cache).logits
    except (ValueError, TypeError, StrictDataclassError):
        return False
    if logits.shape != (1, 5, SIZES["vocab_size"]):
        raise RuntimeError(f"logits of shape {list(logits.shape)}")
    again = XCLlamaConfig.from_dict(made.to_dict())
    if again.to_dict() != made.to_dict():
        raise RuntimeError("a config that does not survive its own JSON")
    return True


def spoil(index: object, random: Random) -> object:
    """An index as something else: of another type, out of range, nested, or no number."""
    odd = (
        1.0,
        1.5,
        float("nan"),
        "1",
        None,
        True,
        2**31,
        -1,
        3,
        [0],
        1j,
        numpy.int64(1),
        numpy.bool_(1),
        numpy.float32(1),
    )
    return random.choice((*odd, torch.tensor(1), torch.tensor(1.0), torch.tensor(True), torch.tensor([1]), index))


def indices(random: Random) -> bool:
    """Rows are those that were named, or a TypeError or ValueError says why not."""
    cache = ContextCache({"hidden": torch.zeros(6, 4)}, (0, 1, 3, 6), torch.arange(6, dtype=torch.int32), "f")
    named: object = [random.randrange(-1, 4) for _ in range(random.randrange(5))]
    plain = list(named)
    mask = [random.random() < 0.5 for _ in range(random.choice((2, 3, 3, 3, 4)))]
    form = random.randrange(8)
    if form == 0:
        named = torch.tensor(named)
    elif form == 1:
        named = numpy.array(named).astype(random.choice(("int8", "int64", "uint8", "float32", "bool")))
    elif form == 2:
        named, plain = random.choice((mask, torch.tensor(mask), numpy.array(mask))), None
    elif form == 3:
        named, plain = [spoil(index, random) for index in named], None
    elif form == 4:
        named, plain = spoil(0, random), None
    elif form == 5:
        named = iter(named)
    try:
        groups = random.random() < 0.5
        rows = cache.join([named]).rows[0] if groups else tuple(row[0] for row in cache.select(named).rows)
    except (TypeError, ValueError):
        return False
    if form == 2 and list(rows) != [place for place, kept in enumerate(mask) if kept]:
        raise RuntimeError(f"{mask} picked {rows}")
    if form not in (1, 2, 3, 4) and list(rows) != plain:
        raise RuntimeError(f"{plain} picked {rows}")
    if not all(type(row) is int and 0 <= row < 3 for row in rows):
        raise RuntimeError(f"rows {rows}")
    return True


KINDS: dict[str, Callable[[Random], bool]] = {"manifest": manifest, "config": config, "indices": indices}


def fuzz(kind: str, seconds: float, seed: int, count: int | None) -> dict[str, object]:
    """Inputs of a kind until the time is over; returns how many were read and refused, and what went wrong."""
    read, made, findings, end = 0, 0, [], time.monotonic() + seconds
    while (time.monotonic() < end if count is None else made < count) and len(findings) < 20:
        try:
            read += KINDS[kind](Random(f"{kind} {seed + made}"))
        # whatever is raised beside what is allowed is the finding
        except Exception as error:  # noqa: BLE001
            findings.append(f"--seed {seed + made}: {type(error).__name__}: {error!s:.300}")
        made += 1
    return {"inputs": made, "read": read, "refused": made - read - len(findings), "findings": findings}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="for all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="inputs of each kind, instead of a time")
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--output", type=Path, help="JSON with what was run and found")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kinds = [arguments.only] if arguments.only else list(KINDS)
    found = {kind: fuzz(kind, arguments.seconds / len(kinds), arguments.seed, arguments.count) for kind in kinds}
    print(json.dumps(found, indent=1))
    if arguments.output:
        write_result(arguments.output, found, MEASURED, seed=arguments.seed)
    return int(any(counts["findings"] for counts in found.values()))


if __name__ == "__main__":
    sys.exit(main())
