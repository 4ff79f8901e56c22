"""Ahead-of-time compilation of planned launches, with no GPU, and what the binaries say about themselves."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from xcllama_kernels.launch import Launch, Target

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int8: "*i8", torch.uint8: "*u8",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
DIVISIBLE = [["tt.divisibility", 16]]


def gpu_target(target: Target) -> GPUTarget:
    """Triton's name of a target."""
    return GPUTarget(target.backend, target.arch, 32 if target.backend == "cuda" else 64)


def specialize(launch: Launch) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes that the launcher would derive from the arguments of `launch`."""
    values = launch.arguments | launch.constants
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(launch.kernel.arg_names):
        value = values[name]
        if name in launch.constants or value is None or value is True or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            # allocations are aligned to 16 bytes or more
            signature[name] = POINTERS[value.dtype]
            attributes[(position,)] = DIVISIBLE
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(position,)] = DIVISIBLE
        else:
            signature[name] = "fp32"
    return signature, constants, attributes


def compile_launch(launch: Launch, target: Target):
    """The compiled kernel of a launch (planned on meta tensors) for `target`."""
    signature, constants, attributes = specialize(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=gpu_target(target), options=launch.options())


def _nvidia_resources(compiled) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [NVIDIA_TOOLS / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        command = [NVIDIA_TOOLS / "nvdisasm", "-c", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    # spills are loads and stores to local memory
    spills = sum(int(width or 32) // 8 for width in re.findall(r"\bSTL(?:\.(\d+))?\b", sass))
    return {
        "registers": registers,
        "spill_bytes": spills,
        "local_bytes": int(re.search(r"LOCAL:(\d+)", usage).group(1)),
        "stack": int(re.search(r"STACK:(\d+)", usage).group(1)),
    }


def _amd_resources(compiled) -> dict[str, int]:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

    return {
        "registers": number("vgpr_count"),
        "spill_bytes": 4 * 64 * number("vgpr_spill_count"),
        "scratch": number("private_segment_fixed_size"),
        "agpr": number("agpr_count"),
    }


def resources(compiled, target):
    out = _nvidia_resources(compiled) if target.backend == "cuda" else _amd_resources(compiled)
    text = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    kinds = {"wgmma": r"wgmma\.mma_async", "mma.sync": r"mma\.sync", "tcgen05": r"tcgen05\.mma", "mfma": r"v_mfma_"}
    counts = Counter({k: len(re.findall(p, text)) for k, p in kinds.items()})
    out["tensor"] = {k: v for k, v in counts.items() if v}
    out["async"] = len(re.findall(r"cp\.async\.c[ag]\.|buffer_load_dword.* lds|global_load_lds", text))
    out["shared"] = compiled.metadata.shared
    return out
