"""What a request's context costs in memory: bytes of the file, mapped from it, of states, of keys and values."""

from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class MemoryReport:
    """Sizes in bytes. States that are mapped are read from the page cache; keys and values are resident.

    Args:
        num_tokens: context tokens that the rows read, each document counted once.
        num_rows: requests that read them.
        file_bytes: size of the file that the states are mapped from; 0: they come from no file.
        mapped_bytes: bytes of the states that are mapped, not copied.
        state_bytes: bytes of the states, scales included.
        key_value_bytes: bytes of keys and values over all cross-attention layers, as held in memory; 0 where the cache
            itself holds them (condensed) or nothing is projected yet.
    """

    num_tokens: int
    num_rows: int
    file_bytes: int
    mapped_bytes: int
    state_bytes: int
    key_value_bytes: int

    def to_dict(self) -> dict[str, int]:
        """The sizes by name."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.num_tokens:,} context tokens, read by {self.num_rows:,} rows"]
        for name in ("file_bytes", "mapped_bytes", "state_bytes", "key_value_bytes"):
            size, label = getattr(self, name), name.removesuffix("_bytes").replace("_", " ")
            each = f"{size / self.num_tokens:,.1f} bytes a token" if self.num_tokens else "no tokens"
            lines.append(f"{label:>9}: {size / 2**20:12,.2f} MiB  ({each})")
        return "\n".join(lines)


def _mappings() -> list[tuple[int, int, str]]:
    """(start, end, path) of every mapped file of this process; empty where the system does not say."""
    table = Path("/proc/self/maps")
    if not table.exists():
        return []
    entries = [line.split(maxsplit=5) for line in table.read_text().splitlines()]
    spans = [(entry[0].split("-"), entry[5]) for entry in entries if len(entry) == 6 and entry[5].startswith("/")]
    return [(int(start, 16), int(end, 16), path) for (start, end), path in spans]


def _tensors(states) -> list[Tensor]:
    parts = ((state,) if isinstance(state, Tensor) else state.tensors() for state in states)
    return [tensor for part in parts for tensor in part if tensor.numel()]


def memory_report(cache, projected=None) -> MemoryReport:
    """Measure a `ContextCache` and, where there is one, the `ProjectedContext` made from it."""
    tensors = [tensor for tensor in _tensors(cache.states.values()) if tensor.device.type == "cpu"]
    mapped, files = 0, set()
    for start, end, path in _mappings():
        inside = [tensor for tensor in tensors if start <= tensor.data_ptr() < end]
        mapped += sum(tensor.nbytes for tensor in inside)
        files |= {path for _ in inside}
    own = {tensor.untyped_storage().data_ptr() for tensor in _tensors(cache.states.values())}
    made = {} if projected is None else {t.data_ptr(): t for t in _tensors((*projected.keys, *projected.values))}
    return MemoryReport(
        num_tokens=cache.num_tokens,
        num_rows=len(cache),
        file_bytes=sum(Path(path).stat().st_size for path in files if Path(path).exists()),
        mapped_bytes=mapped,
        state_bytes=cache.nbytes,
        key_value_bytes=sum(t.nbytes for t in made.values() if t.untyped_storage().data_ptr() not in own),
    )
