"""Ahead-of-time compilation of planned launches, with no GPU, and what the binaries say about themselves."""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from xcllama_kernels.launch import Launch, Target

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": Target("cuda", 80, 108),
    "sm_90": Target("cuda", 90, 132),
    "sm_100": Target("cuda", 100, 148),
    "gfx942": Target("hip", "gfx942", 304),
}
# shared memory that one program may have, and that one processor has, in bytes
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
SHARED_TOTAL = {"sm_80": 167936, "sm_90": 233472, "sm_100": 233472, "gfx942": 65536}
POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int8: "*i8", torch.uint8: "*u8",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
TENSOR_CORE = {
    "wgmma": r"wgmma\.mma_async",
    "mma.sync": r"\bmma\.sync",
    "tcgen05": r"tcgen05\.mma\.",
    "mfma": r"v_mfma_",
}
ASYNC_COPY = r"\bcp\.async\.c[ag]\.|buffer_load_dword\S* .*\blds\b|global_load_lds"


def specialize(launch: Launch) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes that Triton's launcher would derive from the arguments of `launch`."""
    values = launch.arguments | launch.constants
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(launch.kernel.arg_names):
        value = values[name]
        if name in launch.constants or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            # allocations are aligned to 16 bytes or more
            signature[name] = POINTERS[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return signature, constants, attributes


def source_of(launch: Launch) -> ASTSource:
    """What is compiled; its hash covers the code, the signature and the constants."""
    return ASTSource(launch.kernel, *specialize(launch))


def compile_launch(launch: Launch, target: Target):
    """The compiled kernel of a launch (planned on meta tensors) for `target`."""
    source = source_of(launch)
    gpu = GPUTarget(target.backend, target.arch, 32 if target.backend == "cuda" else 64)
    return triton.compile(source, target=gpu, options=launch.options())


def loop_lines(text: str) -> list[str]:
    """Lines of an assembly listing that lie in a loop: between a label and a later branch back to it."""
    lines = text.splitlines()
    labels = {}
    inside = [False] * len(lines)
    for number, line in enumerate(lines):
        if label := re.match(r"^(\$?\.?L[\w$]+):", line):
            labels[label.group(1)] = number
        elif branch := re.search(r"\b(?:bra(?:\.uni)?|s_c?branch\w*)\s+(\$?\.?L[\w$]+)", line):
            start = labels.get(branch.group(1))
            if start is not None:
                inside[start:number] = [True] * (number - start)
    return [line for line, loop in zip(lines, inside, strict=True) if loop]


def _nvidia_resources(compiled) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(NVIDIA_TOOLS / "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # bytes a thread; the stack holds nothing but spills: the kernels have no local arrays and call nothing
    names = {"registers": "REG", "spill_bytes": "STACK"}
    return {name: int(re.search(rf"{key}:(\d+)", usage).group(1)) for name, key in names.items()}


def _amd_resources(compiled) -> dict[str, int]:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

    # scratch memory of a lane holds nothing but spills: the kernels have no local arrays and call nothing
    spilled = max(number("private_segment_fixed_size"), 4 * number("vgpr_spill_count"))
    return {"registers": number("vgpr_count"), "spill_bytes": spilled}


def occupancy(target: str, registers: int, shared: int, num_warps: int) -> float:
    """Resident warps over the most that a processor holds."""
    if target == "gfx942":
        # four units of 512 registers a lane, eight waves each
        waves = min(8, 512 // max(8, -(-registers // 8) * 8)) * 4
        programs = min(waves // num_warps, SHARED_TOTAL[target] // max(shared, 1))
        return programs * num_warps / 32
    a_warp = -(-max(registers, 1) * 32 // 256) * 256
    programs = min(65536 // a_warp // num_warps, 64 // num_warps, SHARED_TOTAL[target] // (shared + 1024), 32)
    return programs * num_warps / 64


def inspect(launch: Launch, target: str) -> dict[str, object]:
    """Compile `launch` for `target` and read off registers, spills, shared memory and the instruction mix."""
    compiled = compile_launch(launch, TARGETS[target])
    nvidia = TARGETS[target].backend == "cuda"
    resources = _nvidia_resources(compiled) if nvidia else _amd_resources(compiled)
    text = compiled.asm["ptx" if nvidia else "amdgcn"]
    loops = "\n".join(loop_lines(text))
    counts = {kind: len(re.findall(pattern, text)) for kind, pattern in TENSOR_CORE.items()}
    looped = {kind: len(re.findall(pattern, loops)) for kind, pattern in TENSOR_CORE.items()}
    shared = int(compiled.metadata.shared)
    return resources | {
        "shared_bytes": shared,
        "tensor_core_instructions": {kind: count for kind, count in counts.items() if count},
        "tensor_core_instructions_in_loops": {kind: count for kind, count in looped.items() if count},
        "async_copies": len(re.findall(ASYNC_COPY, text)),
        "occupancy": round(occupancy(target, resources["registers"], shared, launch.config.num_warps), 4),
    }
