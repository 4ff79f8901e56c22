"""The tables of docs/reliability.md and docs/cache_format.md, each from one file of results/."""

from pathlib import Path

from xcllama.provenance import caption
from xcllama.publishing.model_card import read_result

RESULTS = Path(__file__).resolve().parent.parent / "results"
JOBS = {"save": "`cache.save`", "add": "`store add`", "compact": "`store add` and `compact`", "pull": "`pull`"}


def kill_table() -> str:
    """What was lost, corrupt or left over after so many kills of each kind of writer."""
    result = read_result(RESULTS, "kill_tests")
    if result is None:
        return "Not measured yet: `python scripts/kill_tests.py --count 1000 --output results/kill_tests.json`."
    lines = [
        "| killed with SIGKILL during | kills | operations done | lost commits | corrupt reads | bytes left over |",
        "|---|" + "---:|" * 5,
    ]
    fields = ("kills", "operations", "lost_commits", "corrupt_reads", "bytes_left_over")
    for job, counts in result["jobs"].items():
        lines.append(f"| {JOBS[job]} | " + " | ".join(f"{counts[field]:,}" for field in fields) + " |")
    return "\n".join(lines) + f"\n\n{caption(result['provenance'])}"


def outliers_table() -> str:
    """Errors and answers of quantized caches with one scale for all values of a group, and with two of them kept."""
    result = read_result(RESULTS, "quantization")
    if result is None:
        return "Not measured yet: `python scripts/measure_quantization.py --output results/quantization.json`."
    lines = [
        "| states, relative error of what is no outlier | stands out | int8 before | int8 | int4 before | int4 |",
        "|---|" + "---:|" * 5,
    ]
    for row in result["states"]:
        shares = [f"{100 * row[f'int{bits}_{way}']:.2g} %" for bits in (8, 4) for way in ("before", "after")]
        lines.append(f"| {row['tokens']} | {row['stands_out']['most']:,.0f} x | " + " | ".join(shares) + " |")
    lines += ["", "| cache | token F1 | loss of the right answers |", "|---|---:|---:|"]
    for name, score in result["quality"].items():
        lines.append(f"| {name.removesuffix(' after')} | {100 * score['f1']:.1f} | {score['loss']:.3f} |")
    sizes = f"{result['questions']} questions, {result['tokens']:,} tokens of context, {result['checkpoint']}."
    return "\n".join(lines) + f"\n\n{sizes} {caption(result['provenance'])}"


def fingerprint_table() -> str:
    """Bytes of weights that a fingerprint reads, once and at every later call, and the time of this processor."""
    result = read_result(RESULTS, "fingerprint")
    if result is None:
        return "Not measured yet: `python scripts/measure_fingerprint.py --output results/fingerprint.json`."
    whole, sampled = (result[f"{name}_seconds_per_gigabyte"] for name in ("whole", "sampled"))
    lines = ["| states of | read once | seconds | looked at by every call | seconds |", "|---|" + "---:|" * 4]
    for row in result["models"]:
        layer = "the last layer" if row["context_layer"] is None else f"layer {row['context_layer']}"
        gigabytes = row["whole_bytes"] / 1e9
        again = sampled if row["sampled_bytes"] < row["whole_bytes"] else whole
        lines.append(
            f"| {row['decoder']}, {layer} | {gigabytes:,.2f} GB | {whole * gigabytes:.2g} "
            f"| {row['sampled_bytes'] / 1e6:,.1f} MB | {again * gigabytes:.2g} |"
        )
    return "\n".join(lines) + f"\n\nSeconds of one core. {caption(result['provenance'])}"


RELIABILITY_TABLES = {"kills": kill_table, "outliers": outliers_table, "fingerprint": fingerprint_table}
