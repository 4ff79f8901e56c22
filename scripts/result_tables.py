"""The tables of README.md and docs/, each made from configs or one file of results/."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving_tables import replicas_table, serving_table
from transformers import BertConfig

from modeling_xcllama import XCLlamaConfig
from xcllama.costs import cache_bytes, key_value_bytes
from xcllama.provenance import age, caption
from xcllama.publishing.model_card import DEFAULT, read_result, scored_runs

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
# shapes of the published configs: layers, query heads, key/value heads, head size, hidden size
DECODERS = {
    "Llama-2-7B": (32, 32, 32, 128, 4096),
    "Llama-3-8B": (32, 32, 8, 128, 4096),
    "SmolLM2-135M": (30, 9, 3, 64, 576),
}
MINILM_WIDTH = 384
# what the short tables of README show
QUALITY_TASK = "squad_sample"
REQUESTS = ("hidden 16-bit, file warm", "hidden int8, file warm", "condensed 16-bit, file warm",
            "KV prefix, file warm", "llama.cpp, slot restored", "text in the prompt")  # fmt: skip


def decoder_config(name: str, **fields) -> XCLlamaConfig:
    """The config of an XC model on one of `DECODERS`."""
    layers, heads, groups, head_dim, hidden = DECODERS[name]
    return XCLlamaConfig(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        hidden_size=hidden,
        **fields,
    )


def bytes_table() -> str:
    """Bytes a token of every kind of cache, and its share of the KV cache."""
    encoder = BertConfig(hidden_size=MINILM_WIDTH)
    rows = {"KV cache, 16 bit": lambda name: key_value_bytes(decoder_config(name))}
    kinds = {
        "hidden": {},
        "condensed": {"cross_attention_share_key_value": True},
        "hidden, MiniLM encoder": {"encoder_config": encoder},
    }
    for label, fields in kinds.items():
        for dtype in ("bfloat16", "int8", "int4"):
            rows[f"{label}, {dtype}"] = lambda name, fields=fields, dtype=dtype: cache_bytes(
                decoder_config(name, **fields), dtype
            )
    lines = head(f"cache | {' | '.join(DECODERS)}")
    for label, measure in rows.items():
        cells = []
        for name in DECODERS:
            size, full = measure(name), key_value_bytes(decoder_config(name))
            cells.append(f"{size:,.0f}" + ("" if size == full else f" ({100 * size / full:.1f} %)"))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def source(name: str, result: dict[str, Any], rows: list[dict[str, Any] | None] = ()) -> str:
    """Where a table comes from, a line for each state of the code that its rows were measured at.

    Args:
        rows: what rows that were measured apart say of it; None or {}: nothing of their own.
    """
    own = ("commit", "dirty", "code", "machine", "cpu_capability", "date")
    states: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows or [{}]:
        run = result["provenance"] | {field: row[field] for field in own if row and field in row}
        states.setdefault((run["commit"], run["dirty"], run["machine"], str(run.get("code"))), []).append(run)
    lines = []
    for runs in states.values():
        part = f" ({len(runs)} rows)" if len(states) > 1 else ""
        lines.append(f"\n`results/{name}.json`{part}: {caption(runs[-1])}, {age(runs[-1])}.")
    return "\n".join(lines)


def measured(name: str, command: str, origins: Callable[[dict[str, Any]], list] = lambda result: []) -> Callable:
    """Make a table of what turns results/NAME.json into lines: with its source below, or with what measures it.

    Args:
        origins: of rows that were measured apart, see `source`.
    """

    def make(lines_of: Callable[[dict[str, Any]], list[str]]) -> Callable[[], str]:
        def table() -> str:
            result = read_result(RESULTS, name)
            if result is None:
                return f"Not measured yet: `{command}`."
            return "\n".join(lines_of(result)) + "\n" + source(name, result, origins(result))

        return table

    return make


def head(columns: str, left: int = 1) -> list[str]:
    """The first lines of a table whose columns stand between bars; those behind the first `left` hold numbers."""
    return [f"| {columns} |", "|" + "---|" * left + "---:|" * (columns.count("|") + 1 - left)]


def cell(value: float | None, form: str) -> str:
    """A number in `form`; empty where there is none."""
    return "" if value is None else format(value, form)


@measured("demo", "python scripts/demo.py --json results/demo.json")
def demo_table(result: dict[str, Any]) -> list[str]:
    """The figures and answers of `make demo`."""
    lines = head(
        "document | passages | tokens | cache file | KV cache | first token, cache | first token, prompt | ratio"
    )
    for row in result["documents"]:
        cache, prompt = row["first_token_from_cache_seconds"], row["first_token_from_prompt_seconds"]
        lines.append(
            f"| {row['document']} | {row['passages']} | {row['tokens']:,} | {row['file_bytes'] / 1024:,.0f} KiB "
            f"| {row['kv_cache_bytes'] / 1024:,.0f} KiB | {1000 * cache:,.0f} ms | {1000 * prompt:,.0f} ms "
            f"| {prompt / cache:.1f} |"
        )
    answers = [item for row in result["documents"] for item in row["answers"]]
    right = sum(item["right"] for item in answers)
    lines += ["", f"{right} of {len(answers)} answers hold what is expected:", ""]
    lines += head("question | expected | passage found | answer from its cache", left=4)
    for item in answers:
        answer = item["answer"].replace("\n", " ").replace("|", "\\|")
        lines.append(f"| {item['question']} | {item['expected']} | {item['passage']} | {answer} |")
    return lines


@measured(f"eval_{DEFAULT}", "make evaluate-test", lambda result: [run["origin"] for run in result["runs"]])
def evaluation_table(result: dict[str, Any]) -> list[str]:
    """Quality and cost of every method on the held-out questions, and what the project aims at."""
    lines = head("method | task | questions | F1 or accuracy | 95 % interval | exact | bytes a token", left=2)
    for run in scored_runs(result):
        figure, exact, cost = run["score"], run["quality"].get("exact_match", {}), run["cost"]
        low, high = figure["interval"]
        lines.append(
            f"| {run['method']} | {run['task']} | {figure['documents']} | {figure['value']:.3f} "
            f"| {low:.3f} to {high:.3f} | {cell(exact.get('value'), '.3f')} "
            f"| {cell(cost.get('cache_bytes_per_token'), ',.0f')} |"
        )
    if aims := result.get("targets"):
        lines += ["", "| checkpoint | task | target | value | required | met |", "|---|---|---|---:|---:|---|"]
        lines += [
            f"| {aim['model']} | {aim['task']} | {aim['target']} | {aim['value']:.3f} "
            f"| {aim['relation']} {aim['required']:.3f} | {'yes' if aim['met'] else 'no'} |"
            for aim in aims
        ]
    return lines


def questions_seen(model: str) -> int | None:
    """How many questions a checkpoint or adapter saw in training; 0: it is no trained one, None: not recorded."""
    trained = read_result(ROOT / "checkpoints" / model, "training")
    if trained is None:
        return 0
    counts = [stage.get("questions") for stage in trained["stages"]]
    return None if None in counts else sum(counts)


def quality_runs(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of README's table: controls, and quantized caches of other checkpoints, stand in docs/results.md."""
    shown = [run for run in scored_runs(result) if run["task"] == QUALITY_TASK and run["mode"] != "cross_shuffled"]
    return [run for run in shown if run["model"] == DEFAULT or run["cache_dtype"] not in ("int8", "int4")]


@measured(f"eval_{DEFAULT}", "make evaluate-test", lambda result: [run["origin"] for run in quality_runs(result)])
def quality_table(result: dict[str, Any]) -> list[str]:
    """The main task of the evaluation alone, with the questions that each method saw in training."""
    lines = head("method | F1 | 95 % interval | questions seen in training | bytes a token")
    shown = quality_runs(result)
    for run in shown[:10]:
        low, high = run["score"]["interval"]
        seen = questions_seen(run["model"])
        lines.append(
            f"| {run['method']} | {run['score']['value']:.3f} | {low:.3f} to {high:.3f} "
            f"| {'not recorded' if seen is None else format(seen, ',')} "
            f"| {cell(run['cost'].get('cache_bytes_per_token'), ',.0f')} |"
        )
    documents = shown[0]["score"]["documents"]
    lines += ["", f"{documents} questions of `{QUALITY_TASK}`, split {shown[0]['split']}."]
    return lines


@measured("ablations", "make ablations", lambda result: [row.get("provenance") for row in result["rows"]])
def ablations_table(result: dict[str, Any]) -> list[str]:
    """What each choice of the recipe gives or costs in short runs."""
    answers = result["rows"][0]["answers"]
    lines = head(
        f"after {result['rows'][0]['step']} steps | trained weights | loss of a held-out answer token "
        f"| with another passage | F1, {answers['questions']} questions of `{answers['task']}` | 95 % interval"
    )
    for row in result["rows"]:
        loss, (low, high) = row["held_out"]["answer_loss"], row["answers"]["interval"]
        lines.append(
            f"| {row['row']} | {row['parameters']['trained']:,} | {loss['right_context']:.3f} "
            f"| {loss['wrong_context']:.3f} | {row['answers']['f1']:.3f} | {low:.3f} to {high:.3f} |"
        )
    return lines


@measured("reading_layers", "python scripts/reading_layers.py")
def reading_layers_table(result: dict[str, Any]) -> list[str]:
    """What of the prompt's gain a reader without training keeps, and what it costs, by states and reading layers."""
    prompt, least = result["loss_prompt"], result["loss_without"]
    lines = head(
        "cached states | layers that read | loss of held-out text | of the prompt's gain | bytes a token, stored "
        f"| resident | ms a token at {result['context_tokens']:,} tokens"
    )
    for row in result["rows"]:
        lines.append(
            f"| {' and '.join(map(str, row['states']))} | {len(row['layers'])} | {row['loss']:.3f} "
            f"| {100 * (least - row['loss']) / (least - prompt):.0f} % | {row['stored_bytes_per_token']:,} "
            f"| {row['resident_bytes_per_token']:,} | {1000 * row['step_seconds']:.1f} |"
        )
    size, seconds = result["prompt_bytes_per_token"], result["prompt_step_seconds"]
    lines += [
        f"| keys and values of the prompt | all | {prompt:.3f} | 100 % | {size:,} | {size:,} | {1000 * seconds:.1f} |",
        f"| none | | {least:.3f} | 0 % | | | |",
    ]
    return lines


def request_lines(result: dict[str, Any], only: tuple[str, ...] | None = None) -> list[str]:
    """Latency and bytes of requests at 4,096 tokens, or at the longest context that was measured."""
    measured = [int(name.split("_")[1]) for name in result if name.startswith("context_") and name[8:].isdecimal()]
    length = 4096 if 4096 in measured else max(measured)
    lines = head(
        f"{length:,} tokens of context, one request | first token | a token after it | on disk | keys and values"
    )
    requests = result[f"context_{length}"]["requests"]
    for name in only or requests:
        if name not in requests:
            continue
        row = requests[name]
        times = (row.get(field, {}).get("median") for field in ("first_token_seconds", "step_seconds"))
        sizes = (row.get(field) for field in ("file_bytes", "resident_bytes"))
        cells = ["" if seconds is None else f"{1000 * seconds:,.1f} ms" for seconds in times]
        cells += ["" if size is None else f"{size / 2**20:,.1f} MiB" for size in sizes]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


@measured("benchmark", "make bench")
def requests_table(result: dict[str, Any]) -> list[str]:
    """Of the speed table the requests that a user chooses between."""
    return request_lines(result, REQUESTS)


@measured("benchmark", "make bench")
def speed_table(result: dict[str, Any]) -> list[str]:
    """Latency and bytes of every way to answer from a long context, and the ratios that have a target."""
    lines = request_lines(result)
    lines += ["", *head("ratio | measured | target")]
    for name, row in result["ratios"].items():
        if row["target"] is not None:
            lines.append(f"| {name} | {row['value']:.2f} | {row['target']} |")
    return lines


@measured("store_benchmark", "python scripts/benchmark_store.py --json results/store_benchmark.json")
def store_table(result: dict[str, Any]) -> list[str]:
    """What the context store costs beside a raw control of the same run; what the run did not measure is left out."""
    rows = [
        (f"read {count} documents, warm; memory map", "microseconds", "raw_microseconds", 1, "us", row)
        for count, row in result.get("warm", {}).items()
    ] + [
        (f"read {count} documents, cold, several times; `preadv`", "seconds", "raw_seconds", 1e3, "ms", row)
        for count, row in result.get("cold", {}).items()
    ]
    if write := result.get("write"):
        field = "megabytes_per_second"
        rows.append(("write; write + fsync", field, f"raw_{field}", 1, "MB/s", write))
    if first := result.get("first_token"):
        row = first | {"ratio": 1 / first["store_over_bare_file"]}
        rows.append(("first token; bare cache file", "seconds", "bare_file_seconds", 1e3, "ms", row))
    lines = head("what; control | store | control | store / control, in throughput")
    for what, field, control, scale, unit, row in rows:
        cells = [f"{scale * row[key]:,.0f} {unit}" for key in (f"store_{field}", control)]
        lines.append(f"| {what} | {' | '.join(cells)} | {row['ratio']:.2f} |")
    facts = []
    if search := result.get("search"):
        lookup = search["lookup_median_microseconds"]
        facts.append(f"{lookup:.1f} us to find one of {search['documents']:,} ids")
        times = f"{search['median_milliseconds']:.1f} ms (95th percentile {search['p95_milliseconds']:.1f} ms)"
        facts.append(f"{times} to search {search['documents']:,} documents")
    if used := result.get("memory", {}).get("used_bytes_by_documents"):
        counts = list(used)
        facts.append(
            f"{result['memory']['bytes_per_document']:,.0f} bytes of memory a document from {int(counts[0]):,} to "
            f"{int(counts[-1]):,} documents (x {result['memory']['growth']:.2f} in all)"
        )
    # what else the machine did makes single figures, and ratios a little, worse
    facts.append(f"load average of the machine at the start {result['load_average']:.1f}")
    lines += ["", "; ".join(facts) + "."]
    return lines


@measured("kernels_inspect", "make kernels-inspect")
def kernels_table(result: dict[str, Any]) -> list[str]:
    """What the compiler makes of the Triton kernels on each chip, and the least time of a decoding step."""
    lines = [
        "| chip | variants | registers | spilled bytes | shared memory | products | decode: bytes asked / needed |",
        "|---|" + "---:|" * 4 + "---|---:|",
    ]
    for chip in dict.fromkeys(record["target"] for record in result["kernels"]):
        records = [record for record in result["kernels"] if record["target"] == chip]
        most = {
            field: max(record[field] for record in records) for field in ("registers", "spill_bytes", "shared_bytes")
        }
        kinds = sorted({kind for record in records for kind in record["tensor_core_instructions_in_loops"]})
        asked = [row["bytes_requested"] / row["bytes_required"] for row in records if row["kernel"] == "decode_kernel"]
        lines.append(
            f"| {chip} | {len(records)} | {most['registers']} | {most['spill_bytes']} "
            f"| {most['shared_bytes'] / 1024:,.0f} KiB | {', '.join(kinds)} | {max(asked):.3f} |"
        )
    chips = ("H100", "MI300X")
    times = " | ".join(f"{bits}, {chip}" for chip in chips for bits in ("16 bit", "int8", "int4"))
    lines += ["", *head(f"least time of decoding, 32 heads, 8 KV heads of 128 | {times}")]
    rows = [row for row in result["rooflines"] if row["heads"] == [32, 8]]
    for batch, context in dict.fromkeys((row["batch"], row["context"]) for row in rows):
        times = {row["bits"]: row["decode_us"] for row in rows if (row["batch"], row["context"]) == (batch, context)}
        cells = [f"{times[bits][chip]:,.1f} us" for chip in chips for bits in (0, 8, 4)]
        lines.append(f"| {batch} x {context:,} tokens of context | {' | '.join(cells)} |")
    return lines


def headline_table() -> str:
    """What a cache costs and gives beside the same text in the prompt; times where a benchmark has them."""
    evaluation, benchmark = read_result(RESULTS, f"eval_{DEFAULT}"), read_result(RESULTS, "benchmark")
    if evaluation is None:
        return "Not measured yet: `make evaluate-test bench`."
    runs = {run["method"]: run for run in scored_runs(evaluation) if run["task"] == QUALITY_TASK}
    methods = {
        "text in the prompt": ("lora-prompt / LoRA / prompt", "text in the prompt"),
        "context cache": (f"{DEFAULT} / cross / bfloat16", "hidden 16-bit, file warm"),
        "context cache, int8": (f"{DEFAULT} / cross / int8", "hidden int8, file warm"),
    }
    columns = {title: names for title, names in methods.items() if names[0] in runs}
    shown = [runs[method] for method, _ in columns.values()]
    rows = {
        "bytes a token": [f"{run['cost']['cache_bytes_per_token']:,.0f}" for run in shown],
        f"F1, `{QUALITY_TASK}`": [f"{run['score']['value']:.3f}" for run in shown],
    }
    if benchmark is not None:
        requests = [benchmark["context_4096"]["requests"][request] for _, request in columns.values()]
        for title, field in (("first token, 4,096 tokens of context", "first_token"), ("a token after it", "step")):
            rows[title] = [f"{1000 * row[f'{field}_seconds']['median']:,.0f} ms" for row in requests]
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


@measured("newcomer", "make newcomer")
def newcomer_table(result: dict[str, Any]) -> list[str]:
    """The questions of `make newcomer` with their answers, and what the commands printed."""
    totals, added = result["totals"], result["add"]
    lines = ["| question | answer | score | from | verdict |", "|---|---|---:|---|---|"]
    for row in result["questions"]:
        answer = str(row["answer"]).replace("\n", " ").replace("|", "\\|")
        shown = f"| {row['question']} | {answer} | {row['score']:.2f} | {row['from'] or ''} "
        lines.append(f"{shown}| {row['verdict']} |")
    warned = sum(len(run["warnings"]) for run in (result["snippets"], added, *result["questions"]))
    lines += [
        "",
        f"{totals['right']} of {totals['of']} right, {totals['declined']} rightly declined, {totals['lost']} declined "
        f"though it is there, {totals['wrong']} wrong, {totals['wrong_and_sure']} of them with a score above 0.5; "
        f"{totals['median_seconds']:.1f} s a question, start of the program included. The snippets of README ended "
        f"with status {result['snippets']['status']} after {result['snippets']['seconds']:.0f} s; `store add` read "
        f"{added['files']['read']} files ({added['added']['tokens']:,} tokens) in {added['seconds']:.0f} s and "
        f"printed {added['lines']} lines; {warned} lines were warnings.",
    ]
    return lines


TABLES = {
    "headline": headline_table,
    "quality": quality_table,
    "requests": requests_table,
    "bytes": bytes_table,
    "demo": demo_table,
    "evaluation": evaluation_table,
    "ablations": ablations_table,
    "reading_layers": reading_layers_table,
    "store": store_table,
    "serving": serving_table,
    "replicas": replicas_table,
    "speed": speed_table,
    "kernels": kernels_table,
    "newcomer": newcomer_table,
}
