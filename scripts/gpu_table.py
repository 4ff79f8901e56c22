"""What `make gpu-check` found on a GPU, as tables of docs/kernels.md."""

from pathlib import Path
from typing import Any

from result_tables import RESULTS, cell, source

from xcllama.publishing.model_card import read_result

FOLDER = "gpu"
OTHERS = ("sdpa", "flex_attention", "flash_attention")
TIMES = {
    "first_token_from_disk_ms": "first token, from disk",
    "first_token_from_memory_ms": "first token, from memory",
    "first_token_ms": "first token",
    "token_ms": "a token after it",
}


def gpu_table(results: Path = RESULTS) -> str:
    """Tests, times and training of results/gpu; what was left out, or failed, says so."""
    parts = {"kernel_tests": _tests, "kernels": _kernels, "model": _model, "train": _train}
    found = {name: read_result(results, f"{FOLDER}/{name}") for name in parts}
    shown = [
        "\n".join([*parts[name](result), source(f"{FOLDER}/{name}", result)])
        for name, result in found.items()
        if result is not None
    ]
    return "\n\n".join(shown) or "Not run on a GPU yet: `make gpu-check`."


def _tests(result: dict[str, Any]) -> list[str]:
    errors = [test["relative_error"] for test in result["tests"] if "relative_error" in test]
    worst = f"; largest relative error against float64 {max(errors):.1e}" if errors else ""
    failed = ", ".join(test["name"] for test in result["tests"] if test["outcome"] == "failed")
    counts = f"{result['passed']} tests of the kernels passed, {result['failed']} failed, {result['skipped']} skipped"
    return [f"{counts}{worst}.{f' Failed: {failed}.' if failed else ''}"]


def _kernels(result: dict[str, Any]) -> list[str]:
    ceilings = result["ceilings"]
    lines = [
        f"A large copy moves {ceilings['bandwidth'] / 1e9:,.0f} GB/s and a large product in bfloat16 does "
        f"{ceilings['operations'] / 1e12:,.1f} TFLOP/s.",
        "", "| aim on Hopper | at least | measured |", "|---|---:|---:|",
        *(f"| {row['target']} | {row['at_least']} | {cell(row['measured'], '.2f')} |" for row in result["targets"]),
        "", f"| rows x tokens | ours | of the copy | of the product | {' | '.join(OTHERS)} |",
        "|---|" + "---:|" * (3 + len(OTHERS)),
    ]  # fmt: skip
    for record in result["records"]:
        if "ours" not in record or record["kind"] == "projection":
            continue
        ours, shape = record["ours"], record["shape"]
        heads = f"{shape['num_heads']}/{shape['num_kv_heads']} x {shape['head_dim']}"
        name = f"{record['kind']}, {shape['batch']} x {shape['context_len']:,}, {heads}"
        bits = f", int{record['bits']}" if record["bits"] else ""
        cells = [_time(ours), *(cell(ours.get(share), ".2f") for share in ("of_copy", "of_product"))]
        lines.append(f"| {name}{bits} | {' | '.join([*cells, *(_time(record.get(other)) for other in OTHERS)])} |")
    return lines + _left_out(len(result["left_out"]))


def _time(result: dict[str, Any] | None) -> str:
    if result is None:
        return ""
    return f"{result['us']:,.1f} us" if "us" in result else "failed"


def _model(result: dict[str, Any]) -> list[str]:
    lines = [f"| rows x tokens | {' | '.join(TIMES.values())} |", "|---|" + "---:|" * len(TIMES)]
    for row in result["rows"]:
        cells = [f"{row[name]:,.2f} ms" if name in row else "" for name in TIMES]
        lines.append(f"| {row['case']}{', failed' if 'failed' in row else ''} | {' | '.join(cells)} |")
    broken = [name for name, holds in result["asserted"].items() if not holds]
    holding = f"Asserted: {len(result['asserted'])}, broken: {', '.join(broken) or 'none'}."
    return [*lines, "", holding, *_left_out(len(result["left_out"]))]


def _train(result: dict[str, Any]) -> list[str]:
    curve, held_out = result["curve"], result["held_out"]
    text = (
        f"Trained for {result['seconds']:,.0f} seconds, {result['questions']:,} questions in {result['steps']:,} steps"
    )
    if curve:
        text += f": loss {curve[0]['loss']:.2f} to {curve[-1]['loss']:.2f}"
    if held_out and held_out["questions"]:
        asked = result["data"].get("held_out", "the pool")
        text += f"; F1 {held_out['f1']:.3f} on {held_out['questions']} questions of {asked}"
    return [f"{text}. It ended by: {result['ended']}."]


def _left_out(count: int) -> list[str]:
    return ["", f"No time was left for {count} cases."] if count else []
