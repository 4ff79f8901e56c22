"""Bytes, operations and roofline of planned launches, counted from the tiles, for contexts of one length.

The counts are those of the load and store instructions that the tiles execute (each address once an instruction); a
test holds them against what the interpreter really requests.
"""

from dataclasses import dataclass
from math import ceil

from xcllama_kernels.decode import token_bytes
from xcllama_kernels.launch import Launch, data_format

# peak bytes/s, 16-bit tensor operations/s and float32 operations/s, from the vendors' data sheets (dense)
CHIPS = {
    "H100": {"bandwidth": 3.35e12, "tensor": 989e12, "float32": 67e12},
    "MI300X": {"bandwidth": 5.3e12, "tensor": 1307e12, "float32": 163e12},
}


@dataclass(frozen=True)
class Shape:
    """Row i of `batch` attends to context i modulo `contexts`, each `context_len` tokens long."""

    batch: int
    contexts: int
    context_len: int
    query_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def rows_of_contexts(self) -> list[int]:
        return [len(range(context, self.batch, self.contexts)) for context in range(min(self.contexts, self.batch))]


@dataclass(frozen=True)
class Traffic:
    """Bytes that must move at least once, bytes that the instructions ask for, and arithmetic operations."""

    required: int
    requested: int
    operations: int

    def roofline_us(self, chip: str, tensor_cores: bool) -> float:
        """Microseconds that memory or arithmetic alone would take at their peaks, whichever is longer."""
        peaks = CHIPS[chip]
        seconds = max(
            self.required / peaks["bandwidth"], self.operations / peaks["tensor" if tensor_cores else "float32"]
        )
        return round(1e6 * seconds, 3)


def _pair_bytes(launch: Launch) -> float:
    """Bytes of the key and value of one token and head."""
    arguments = launch.arguments
    bits = data_format(arguments.get("key_scale"), arguments.get("key_zero"))
    return token_bytes(arguments["key"], bits) + token_bytes(arguments["value"], bits)


def decode_traffic(launches: list[Launch], shape: Shape) -> Traffic:
    """`decode_kernel` and, when the context is split, `combine_kernel`."""
    decode = launches[0]
    block_n, mates = decode.constants["BLOCK_N"], decode.constants["ROWS"]
    num_splits, element = decode.grid[2], decode.arguments["query"].element_size()
    result = element if num_splits == 1 else 4
    size = ceil(ceil(shape.context_len / num_splits) / block_n) * block_n
    live = ceil(shape.context_len / size)
    rows = shape.batch * shape.query_len * shape.num_heads
    tiles = sum(ceil(count / mates) for count in shape.rows_of_contexts)
    context = shape.context_len * shape.num_kv_heads * _pair_bytes(decode)
    # every program: its context, the rows before it, the bounds; leaders: the rows from theirs on
    before = sum(range(shape.batch))
    leaders = [row for row in range(shape.batch) if row // shape.contexts % mates == 0]
    search = 16 * shape.batch + 4 * before + 4 * sum(shape.batch - row for row in leaders)
    requested = num_splits * shape.num_kv_heads * search + tiles * context
    requested += live * rows * (shape.head_dim * (element + result) + 4)
    if num_splits > 1:
        requested += rows * (12 + live * (8 + 4 * shape.head_dim) + element * shape.head_dim + 4)
    required = len(shape.rows_of_contexts) * context + rows * (2 * element * shape.head_dim + 4)
    required += 4 * shape.batch + 4 * (shape.contexts + 1)
    return Traffic(int(required), int(requested), 4 * rows * shape.context_len * shape.head_dim)


def combine_traffic(launches: list[Launch], shape: Shape) -> Traffic:
    """`combine_kernel` alone."""
    splits, element = launches[0].grid[2], launches[1].arguments["output"].element_size()
    size = ceil(ceil(shape.context_len / splits) / launches[1].constants["BLOCK_N"]) * launches[1].constants["BLOCK_N"]
    live = ceil(shape.context_len / size)
    rows = shape.batch * shape.query_len * shape.num_heads
    output = rows * (element * shape.head_dim + 4)
    required = output + rows * live * (4 + 4 * shape.head_dim) + 4 * shape.batch + 4 * (shape.contexts + 1)
    requested = output + rows * (12 + live * (8 + 4 * shape.head_dim))
    return Traffic(required, requested, 2 * rows * live * shape.head_dim)


def _row_tile_traffic(launch: Launch, shape: Shape, row_bytes: int, products: int) -> Traffic:
    rows = shape.batch * shape.query_len * shape.num_heads
    tiles = launch.grid[0] // shape.batch
    context = shape.context_len * shape.num_kv_heads * _pair_bytes(launch)
    requested = rows * row_bytes + shape.batch * tiles * (context + 12 * shape.num_kv_heads)
    required = rows * row_bytes + len(shape.rows_of_contexts) * context + 4 * shape.batch + 4 * (shape.contexts + 1)
    operations = 2 * products * rows * shape.context_len * shape.head_dim
    return Traffic(int(required), int(requested), operations)


def forward_traffic(launch: Launch, shape: Shape) -> Traffic:
    """`forward_kernel`: query in, output and log-sum-exp out, the context once a tile of rows."""
    element = launch.arguments["query"].element_size()
    return _row_tile_traffic(launch, shape, 2 * element * shape.head_dim + 4, 2)


def query_gradient_traffic(launch: Launch, shape: Shape) -> Traffic:
    """`query_gradient_kernel`: query, output and its gradient in, gradient and delta out."""
    element = launch.arguments["query"].element_size()
    return _row_tile_traffic(launch, shape, 4 * element * shape.head_dim + 8, 3)


def context_gradient_traffic(launch: Launch, shape: Shape) -> Traffic:
    """`context_gradient_kernel`: the rows of a context once a tile of its tokens."""
    element = launch.arguments["query"].element_size()
    rows = shape.query_len * shape.num_heads
    row_bytes = 2 * element * shape.head_dim + 8
    tiles = ceil(shape.context_len / launch.constants["BLOCK_N"])
    tokens = shape.contexts * shape.context_len * shape.num_kv_heads * 4 * element * shape.head_dim
    attended = sum(shape.rows_of_contexts)
    requested = tokens + tiles * attended * (rows * row_bytes + 4 * shape.num_kv_heads)
    required = tokens + attended * (rows * row_bytes + 4)
    return Traffic(required, requested, 8 * attended * rows * shape.context_len * shape.head_dim)


def projection_traffic(launch: Launch) -> Traffic:
    """`inverse_rms_kernel` or `project_kernel`; the shape is in the launch."""
    arguments, constants = launch.arguments, launch.constants
    states = arguments["states"]
    num_tokens, heads, _ = states.shape
    width = heads * constants["DIM"]
    bits = data_format(arguments["scale"], arguments["zero"])
    stored = int(num_tokens * heads * token_bytes(states, bits))
    if "weight" not in arguments:
        return Traffic(stored + 4 * num_tokens, stored + 4 * num_tokens, 2 * num_tokens * width)
    element, columns = arguments["weight"].element_size(), arguments["num_columns"]
    row_tiles = arguments["num_row_tiles"]
    column_tiles = launch.grid[0] // row_tiles
    normed = arguments["norm_weight"] is not None
    rows = stored + 4 * num_tokens * normed
    weight = columns * width * element
    output = num_tokens * columns * element
    bias = element * columns * (arguments["bias"] is not None)
    norm = element * width * normed
    requested = column_tiles * rows + row_tiles * (weight + bias + column_tiles * norm) + output
    return Traffic(rows + weight + bias + norm + output, requested, 2 * num_tokens * width * columns)
