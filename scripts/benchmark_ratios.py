"""Every figure of the benchmark as a ratio to its alternatives and to the limit, with the targets where there are."""

from benchmark_peer import peer_ratios

LAYOUTS = ("hidden", "condensed")


def ratios(results: dict) -> dict[str, dict]:
    """Ratios by name, from what was measured so far: `{"value", "target"}`; more is better, save for memory and
    the requests that pay for encoding.
    """
    found: dict[str, dict] = {}
    for name, part in results.items():
        if name.startswith("context_") and "requests" in part:
            found |= request_ratios(part, int(name.split("_")[1]), results["limits"])
        if name.startswith("peer_") and isinstance(part, dict):
            found |= peer_ratios(part, int(name.split("_")[1]))
    found |= batch_ratios(results)
    if encoding := results.get("encoding"):
        rates, limits = encoding["tokens_per_second"], results["limits"]
        flop = (
            limits["encode_flop_per_token"] * encoding["tokens"] + limits["encode_flop_per_pair"] * encoding["pairs"]
        )
        limit = limits["matrix_product_gflop_per_second"] * 1e9 * encoding["tokens"] / flop
        for name, rate in rates.items():
            if name != "ours":
                target = 1.4 if "as many layers" in name else None
                found[f"encoding, mixed lengths, over {name}"] = _ratio(rates["ours"] / rate, target)
        found["encoding, share of the matrix-product limit"] = _ratio(rates["ours"] / limit, 0.7)
    if lookup := results.get("context_lookup"):
        found["context lookup over plain decoding, a quotation of 64 tokens"] = _ratio(lookup["ratio"], 2)
    return found


def _ratio(value: float, target: float | None = None) -> dict:
    return {"value": value, "target": target}


def request_ratios(part: dict, length: int, limits: dict) -> dict[str, dict]:
    """First token and decoding of one request, at one context length."""
    requests, found = part["requests"], {}
    aim = (lambda target: target) if length == 4096 else (lambda target: None)

    def first(name: str) -> float:
        return requests[name]["first_token_seconds"]["median"]

    def step(name: str) -> float:
        return requests[name]["step_seconds"]["median"]

    for layout in LAYOUTS:
        for state, target in (("cold", 3), ("warm", 1.2)):
            ours = first(f"{layout} 16-bit, file {state}")
            found[f"first token, {layout} file {state}, over the prompt, {length}"] = _ratio(
                first("text in the prompt") / ours, aim(50)
            )
            found[f"first token, {layout} file {state}, over a KV prefix file {state}, {length}"] = _ratio(
                first(f"KV prefix, file {state}") / ours, aim(target)
            )
        ours = step(f"{layout} 16-bit, projected")
        found[f"decoding, {layout}, over the prompt's KV cache, {length}"] = _ratio(
            step("text in the prompt") / ours, aim(1.5)
        )
        limit = (limits["weights_bytes"] + requests[f"{layout} 16-bit, projected"]["resident_bytes"]) / (
            limits["memory_read_gb_per_second"] * 1e9
        )
        compiled = requests.get(f"{layout} 16-bit, compiled")
        best = min(ours, compiled["step_seconds"]["median"]) if compiled else ours
        # what ships is hidden; the other layout is not compiled here
        share = f"decoding, {layout}, share of the bandwidth limit, {length}"
        found[share] = _ratio(limit / best, aim(0.6) if layout == "hidden" else None)
        if compiled:
            theirs = step("text in the prompt, compiled")
            found[f"decoding, {layout}, compiled, over the prompt, compiled, {length}"] = _ratio(
                theirs / compiled["step_seconds"]["median"]
            )
    cross = part["cross_attention"]
    found[f"cross-attention of a step, over projecting at every step, {length}"] = _ratio(
        cross["projected at every step"]["median"] / cross["projected once"]["median"], aim(10)
    )
    saved = first("text in the prompt") - first("hidden 16-bit, file warm")
    found[f"requests that pay for encoding, {length}"] = _ratio(part["encode_seconds"]["median"] / saved)
    return found


def batch_ratios(results: dict) -> dict[str, dict]:
    """Many rows on one context against one row, and against a context or a KV prefix each."""
    found: dict[str, dict] = {}
    for name, part in results.items():
        if not name.startswith("batch_"):
            continue
        rows, length = (int(word) for word in name.split("_")[1::2])
        for other in ("one each", "KV prefix each"):
            if rows > 1 and other in part:
                found[f"tokens a second, {rows} rows shared over {other}, {length}"] = _ratio(
                    part["shared"]["tokens_per_second"] / part[other]["tokens_per_second"]
                )
        one = results.get(f"batch_1_context_{length}")
        if one and rows > 1:
            shared, single = part["shared"], one["shared"]
            aim = rows == 32 and length == 4096
            found[f"tokens a second, {rows} rows on one context over one row, {length}"] = _ratio(
                shared["tokens_per_second"] / single["tokens_per_second"], 8 if aim else None
            )
            weights = results["limits"]["weights_bytes"]
            memory = [weights + part["context_bytes"] + part["peak_bytes"] for part in (shared, single)]
            found[f"memory (weights, context, peak), {rows} rows on one context over one row, {length}"] = _ratio(
                memory[0] / memory[1], 1.2 if aim else None
            )
    return found
