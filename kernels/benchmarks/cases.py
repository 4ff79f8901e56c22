"""What the benchmark times: shapes, inputs on the device, our calls and those of others on the same numbers."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from timing import BEYOND_CACHE
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import linear, scaled_dot_product_attention
from traffic import Shape, decode_traffic, forward_traffic
from variants import attention_tensors
from xcllama_kernels import cross_attention, project_quantized
from xcllama_kernels.cases import Case, random_quantized
from xcllama_kernels.decode import plan_decode
from xcllama_kernels.forward import plan_forward
from xcllama_kernels.launch import target_of
from xcllama_kernels.reference import cross_attention_reference, dequantize

HEADS = ((32, 8, 128), (9, 3, 64))
# products of a query and a context, forward alone and with the backward pass
PRODUCTS = {"training": 7}


@dataclass(frozen=True)
class Work:
    """One case.

    Args:
        kind: "decode", "decode, shared context", "prefill" or "training".
        shape: see `Shape`.
        bits: 0, 8 or 4.
        compiled: whether flex_attention is timed too, which takes a compiler ten seconds.
    """

    kind: str
    shape: Shape
    bits: int
    compiled: bool = False


@dataclass(frozen=True)
class Projection:
    """A fused projection of `num_tokens` states of `heads` x 64 channels in `bits` to `columns`."""

    num_tokens: int
    heads: int
    columns: int
    bits: int
    kind: str = "projection"


def all_cases(dry_run: bool) -> list[Work | Projection]:
    """Every case, what the targets are for first."""
    if dry_run:
        return [
            Work("decode", Shape(2, 2, 20, 1, 2, 1, 16), 0),
            Work("decode", Shape(2, 2, 20, 1, 2, 1, 16), 4),
            Work("decode, shared context", Shape(2, 1, 20, 1, 3, 1, 64), 8),
            Work("prefill", Shape(1, 1, 20, 33, 2, 1, 16), 0),
            Work("training", Shape(2, 2, 20, 5, 2, 1, 16), 0),
            Projection(20, 1, 32, 8),
        ]
    return list(_cases())


def _cases() -> Iterator[Work | Projection]:
    for heads in HEADS:
        for length in (8192, 65536):
            for bits in (0, 8, 4):
                for rows in (8, 1):
                    yield Work("decode", Shape(rows, rows, length, 1, *heads), bits)
        yield Work("decode, shared context", Shape(64, 1, 8192, 1, *heads), 0)
        yield Work("prefill", Shape(4, 4, 4096, 512, *heads), 0)
    for heads in HEADS:
        yield Work("training", Shape(8, 8, 1024, 512, *heads), 0)
        for bits in (8, 4):
            yield Projection(8192, heads[0] * heads[2] // 64, 2 * heads[1] * heads[2], bits)
        for length in (1024, 65536):
            yield Work("decode, shared context", Shape(64, 1, length, 1, *heads), 0)
        for length in (8192, 1024, 65536):
            yield Work("decode", Shape(64, 64, length, 1, *heads), 0)
        for bits in (8, 4):
            yield Work("prefill", Shape(4, 4, 4096, 512, *heads), bits)
            yield Work("decode", Shape(64, 64, 8192, 1, *heads), bits)
        for bits in (0, 8, 4):
            for rows in (8, 1):
                yield Work("decode", Shape(rows, rows, 1024, 1, *heads), bits)
    for heads in HEADS:
        for kind, shape in (
            ("decode", (8, 8, 8192, 1)),
            ("prefill", (4, 4, 4096, 512)),
            ("training", (8, 8, 1024, 512)),
        ):
            yield Work(kind, Shape(*shape, *heads), 0, compiled=True)


def required(work: Work) -> tuple[int, int]:
    """Bytes that must move at least once, and operations of the products."""
    shape, tensors = work.shape, attention_tensors(work.shape, torch.bfloat16, work.bits)
    target = target_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if work.kind.startswith("decode"):
        traffic = decode_traffic(plan_decode(**tensors, target=target), shape)
    else:
        traffic = forward_traffic(plan_forward(**tensors, target=target)[0], shape)
    pairs = shape.batch * shape.query_len * shape.num_heads * shape.context_len
    return traffic.required, 2 * PRODUCTS.get(work.kind, 2) * pairs * shape.head_dim


def make_inputs(work: Work, device: torch.device) -> list[Case]:
    """Random inputs, made on the device, in as many copies as no cache holds."""
    shape = work.shape
    tokens = shape.contexts * shape.context_len
    moved = 2 * tokens * shape.num_kv_heads * shape.head_dim * {0: 2, 8: 1, 4: 0.5}[work.bits]
    copies = max(1, min(256, round(BEYOND_CACHE / moved))) if device.type == "cuda" else 1
    offsets = torch.arange(shape.contexts + 1, dtype=torch.int32, device=device) * shape.context_len
    index = torch.arange(shape.batch, dtype=torch.int32, device=device) % shape.contexts

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=torch.bfloat16, device=device)

    cases = []
    for _ in range(copies):
        query = random(shape.batch, shape.query_len, shape.num_heads, shape.head_dim)
        sizes, quantization = (tokens, shape.num_kv_heads, shape.head_dim), {}
        if work.bits:
            key, quantization["key_scale"], key_zero = random_quantized(*sizes, work.bits, device=device)
            value, quantization["value_scale"], value_zero = random_quantized(*sizes, work.bits, device=device)
            if work.bits == 4:
                quantization |= {"key_zero": key_zero, "value_zero": value_zero}
        else:
            key, value = random(*sizes), random(*sizes)
        cases.append(Case(query, key, value, offsets, index, quantization))
    return cases


def expected_rows(case: Case, rows: list[int]) -> Tensor:
    """The float32 reference of some rows: of all of them, long contexts would take too long."""
    outputs, bounds = [], case.offsets.tolist()
    for row in rows:
        context = int(case.context_index[row])
        start, end = bounds[context], bounds[context + 1]
        parts = {name: tensor[start:end] for name, tensor in case.quantization.items()}
        alone = torch.tensor([0, end - start]), torch.zeros(1, dtype=torch.long)
        states = case.query[row : row + 1], case.key[start:end], case.value[start:end]
        outputs.append(cross_attention_reference(*states, *alone, **parts, dtype=torch.float32)[0])
    return torch.cat(outputs)


# the number of a copy -> a function, and the tensors that it takes, which have gradients in training
Attend = Callable[[int], tuple[Callable[..., Tensor], list[Tensor]]]


def ours(cases: list[Case]) -> Attend:
    """Our kernels."""

    def call(number: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
        case = cases[number]

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return cross_attention(query, key, value, case.offsets, case.context_index, **case.quantization)

        return attend, list(case.arguments[:3])

    return call


def competitors(cases: list[Case], work: Work) -> dict[str, Attend]:
    """By name, what else computes this; the states of a shared context are expanded to its rows, not copied."""
    shape = work.shape

    def by_head(number: int) -> list[Tensor]:
        case, groups = cases[number], shape.batch // shape.contexts
        states = [part.unflatten(0, (shape.contexts, shape.context_len)) for part in (case.key, case.value)]
        states = [part.transpose(1, 2).contiguous() for part in states]
        if shape.contexts == 1:
            states = [part.expand(groups, -1, -1, -1) for part in states]
        return [case.query.transpose(1, 2).contiguous(), *states]

    def sdpa(number: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
        return lambda *parts: scaled_dot_product_attention(*parts, enable_gqa=True).transpose(1, 2), by_head(number)

    calls: dict[str, Attend] = {"sdpa": sdpa}
    if importlib.util.find_spec("flash_attn") is not None and shape.contexts == shape.batch:
        from flash_attn import flash_attn_varlen_func

        lengths = (shape.query_len, shape.context_len)
        steps = torch.arange(shape.batch + 1, dtype=torch.int32, device=cases[0].query.device)

        def flash(number: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
            def attend(*parts: Tensor) -> Tensor:
                output = flash_attn_varlen_func(*parts, *(steps * length for length in lengths), *lengths)
                return output.unflatten(0, (shape.batch, shape.query_len))

            case = cases[number]
            return attend, [case.query.flatten(0, 1), case.key, case.value]

        calls["flash_attention"] = flash
    if work.compiled:
        # shapes that become dynamic are slower, and after eight of them nothing is compiled any more
        torch.compiler.reset()
        compiled = torch.compile(flex_attention, dynamic=False)

        def flex(number: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
            return lambda *parts: compiled(*parts, enable_gqa=True).transpose(1, 2), by_head(number)

        calls["flex_attention"] = flex
    return calls


def projection_inputs(work: Projection, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Quantized states, scale, zero and a bf16 weight."""
    weight = torch.randn(work.columns, 64 * work.heads, device=device).to(torch.bfloat16) / (64 * work.heads) ** 0.5
    return *random_quantized(work.num_tokens, work.heads, 64, work.bits, device=device), weight


def projection_calls(inputs: tuple) -> dict[str, Callable[[], Tensor]]:
    """The fused projection, and dequantizing first."""
    data, scale, zero, weight = inputs
    return {
        "ours": lambda: project_quantized(data, scale, zero, weight),
        "dequantize, then linear": lambda: linear(dequantize(data, scale, zero, weight.dtype).flatten(1), weight),
    }
