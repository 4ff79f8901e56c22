"""The tables of docs/serving.md: what was measured, and what many replicas need by it."""

from pathlib import Path

from xcllama.provenance import age, caption
from xcllama.publishing.model_card import read_result

RESULTS = Path(__file__).resolve().parent.parent / "results"
MISSING = "Not measured yet: `python scripts/benchmark_serving.py --json results/serving.json`."
SERVERS = {"contexts": "contexts", "prompt": "text in the prompt", "llama_cpp": "llama.cpp, text in the prompt"}
REPLICAS = (10, 100, 1000)


def serving_table() -> str:
    """Answers a minute, first token and memory by number of clients, and the targets."""
    result = read_result(RESULTS, "serving")
    if result is None:
        return MISSING
    lines = ["| server | clients | answers a minute | first token, p50 | p95 | peak memory |", "|---|" + "---:|" * 5]
    for name, label in SERVERS.items():
        for clients, row in result.get(name, {}).items():
            first = [f"{1e3 * row[f'first_token_{part}_seconds']:,.0f} ms" for part in ("median", "p95")]
            cells = [clients, f"{row['answers_per_minute']:,.0f}", *first, f"{row['peak_bytes'] / 2**20:,.0f} MiB"]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", _targets(result), ""]
    about = (
        f"{result['documents']} documents of {result['document_tokens']:,} tokens, {result['new_tokens']} new tokens"
    )
    run = result["provenance"]
    return "\n".join([*lines, f"{about}, {result['slots']} rows. `results/serving.json`: {caption(run)}, {age(run)}."])


def _targets(result: dict) -> str:
    ours, prompt = result["contexts"], result["prompt"]
    faster = ours["16"]["answers_per_minute"] / prompt["16"]["answers_per_minute"]
    slower = ours["8"]["first_token_p95_seconds"] / ours["1"]["first_token_p95_seconds"]
    memory = max(row["peak_bytes"] for row in ours.values()) / ours["1"]["peak_bytes"]
    left_out = "" if "llama_cpp" in result else " llama.cpp was left out: xllamacpp was not installed."
    return (
        f"At 16 clients {faster:.1f} times the answers of the prompt (target 4); the 95th percentile of the first "
        f"token at 8 clients {slower:.1f} times that of one (target at most 3); most memory {memory:.2f} times that "
        f"of one client (target at most 1.3).{left_out}"
    )


def replicas_table() -> str:
    """What 10, 100 and 1,000 replicas like the measured one need."""
    result = read_result(RESULTS, "serving")
    if result is None:
        return MISSING
    best = max(result["contexts"].values(), key=lambda row: row["answers_per_minute"])
    rate = best["answers_per_minute"] / 60
    context_bytes = result["document_tokens"] * result["stored_bytes_per_token"]
    rows = {
        "answers a second": lambda count: f"{rate * count:,.0f}",
        "to clients, MB/s": lambda count: f"{rate * count * best['answer_median_bytes'] / 1e6:,.2f}",
        "messages a second through the front": lambda count: f"{rate * count * (result['new_tokens'] + 2):,.0f}",
        "store reads, MB/s, if no question finds its context resident": lambda count: (
            f"{rate * count * context_bytes / 1e6:,.1f}"
        ),
        "store reads, MB/s, if one in twenty does not": lambda count: f"{rate * count * context_bytes / 20e6:,.1f}",
    }
    lines = [
        "| | " + " | ".join(f"{count:,} replicas" for count in REPLICAS) + " |",
        "|---|" + "---:|" * len(REPLICAS),
    ]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(map(cell, REPLICAS))} |" for name, cell in rows.items())])
