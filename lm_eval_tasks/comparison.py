"""The paper's comparison: one checkpoint, every way to give it its contexts, the same tasks; one process a method."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CROSS = {"context_mode": "cross"}
METHODS: dict[str, dict[str, str]] = {
    "cross": CROSS,
    "cross_int8": CROSS | {"cache_dtype": "int8"},
    "cross_int4": CROSS | {"cache_dtype": "int4"},
    "cross_shuffled": {"context_mode": "cross_shuffled"},
    "prompt": {"context_mode": "prompt", "truncation": "True"},
    "prompt_kv": {"context_mode": "prompt_kv", "truncation": "True"},
    "none": {"context_mode": "none"},
}


def method_command(method: str, output: Path, checkpoint: str, adapter: str | None, fid: str | None) -> list[str]:
    """The command line of one method, without tasks.

    Raises:
        ValueError: an unknown method, or one whose model is not given.
    """
    if method == "fid" and fid:
        return ["--model", "fid", "--model_args", f"pretrained={fid}", "--output_path", str(output / method)]
    if method == "lora_prompt" and adapter:
        values = {"pretrained": adapter} | METHODS["prompt"]
    elif method in METHODS:
        values = {"pretrained": checkpoint} | METHODS[method]
        if values["context_mode"].startswith("cross"):
            # right and wrong contexts come from one folder
            values["context_cache_dir"] = str(output / f"contexts-{values.get('cache_dtype', 'auto')}")
    else:
        known = ", ".join([*METHODS, "lora_prompt (with --adapter)", "fid (with --fid)"])
        raise ValueError(f"method {method!r} is unknown or lacks its model; known are {known}.")
    pairs = ",".join(f"{key}={value}" for key, value in values.items())
    options = ["--model", "xcllama", "--model_args", pairs, "--output_path", str(output / method)]
    return [*options, "--apply_chat_template"]


def compare(
    output: Path,
    checkpoint: str,
    methods: Sequence[str],
    arguments: Sequence[str],
    adapter: str | None = None,
    fid: str | None = None,
) -> int:
    """Evaluate `methods` one after the other; a method that has results in `output` is not run again.

    Args:
        output: folder; each method gets one inside.
        arguments: what all methods share: `--tasks`, `--limit`, `--batch_size`, ...

    Returns:
        How many methods failed.

    Raises:
        ValueError: see `method_command`.
    """
    commands = {method: method_command(method, output, checkpoint, adapter, fid) for method in methods}
    failures = 0
    for method, own in commands.items():
        done = output / f"{method}.done"
        if done.exists() and done.read_text() == shlex.join(arguments):
            print(f"{method}: done before")
            continue
        command = [sys.executable, "-m", "lm_eval_tasks", *own, *arguments, "--log_samples"]
        print(f"{method}: {shlex.join(command[1:])}", flush=True)
        if subprocess.run(command).returncode:
            failures += 1
        else:
            done.parent.mkdir(parents=True, exist_ok=True)
            done.write_text(shlex.join(arguments))
    return failures
