"""What a newcomer meets: the README's snippets, the commands on a folder of mixed files, questions with known answers.

python scripts/newcomer.py [--json results/newcomer.json] [--quick] [--checkpoint FOLDER]

Every command is a process of its own, as at a prompt; its lines are counted, and a warning among them is named.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from newcomer_files import QUESTIONS, make_files

from xcllama.evaluation.metrics import normalize_answer
from xcllama.provenance import require_clean, write_result

ROOT = Path(__file__).resolve().parent.parent
XCLLAMA = str(Path(sys.executable).with_name("xcllama"))
MEASURED = ("modeling_xcllama", "xcllama/commands", "xcllama/documents.py", "xcllama/store", "scripts/newcomer.py",
            "scripts/newcomer_files.py")  # fmt: skip
WARNING = re.compile(r"warn|deprecat|traceback|error|is not used|does not support", re.IGNORECASE)
# what is wrong must not be sure
SURE = 0.5


def run(command: list[str], folder: Path) -> dict:
    """Run a command as at a prompt: seconds, lines printed, those of them that warn, exit status, output."""
    begin = perf_counter()
    done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True)
    lines = [line for line in (done.stdout + done.stderr).replace("\r", "\n").splitlines() if line.strip()]
    warnings = [line[:200] for line in done.stderr.splitlines() if WARNING.search(line)]
    print(f"{perf_counter() - begin:6.1f} s, {len(lines)} lines, status {done.returncode}: {' '.join(command)[:100]}")
    figures = {"seconds": perf_counter() - begin, "lines": len(lines), "warnings": warnings, "status": done.returncode}
    return figures | {"output": done.stdout, "errors": done.stderr[-2000:]}


def shown(figures: dict, *more: str) -> dict:
    """What is kept of a command: not its output, unless it failed."""
    kept = ("seconds", "lines", "warnings", "status", *more)
    return {name: figures[name] for name in kept + (("errors",) if figures["status"] else ())}


def verdict(answer: dict, accepted: list[str]) -> str:
    """ "right", "declined" (rightly), "lost" (declined, but it stands there) or "wrong"."""
    if not answer["found"]:
        return "lost" if accepted else "declined"
    given = normalize_answer(answer["text"])
    return "right" if any(normalize_answer(one) in given for one in accepted) else "wrong"


def ask(store: Path, question: str, accepted: list[str], folder: Path) -> dict:
    """One question by the command."""
    done = run([XCLLAMA, "ask", str(store), question, "--json"], folder)
    row = {"question": question, "accepted": accepted} | shown(done)
    if done["status"]:
        return row | {"verdict": "failed", "answer": None, "score": 0.0, "from": None}
    answer = json.loads(done["output"])
    where = answer["hit"] and answer["hit"]["id"]
    return row | {"verdict": verdict(answer, accepted), "answer": answer["text"], "score": answer["score"],
                  "own_answer": max(answer["answers"], key=lambda own: own["score"], default=None),
                  "from": where, "sentence": answer["sentence"]}  # fmt: skip


def totals(questions: list[dict]) -> dict:
    """Counts of the verdicts, and whether anything wrong was sure."""
    counts = {name: sum(row["verdict"] == name for row in questions) for name in
              ("right", "declined", "lost", "wrong", "failed")}  # fmt: skip
    sure = [row["score"] for row in questions if row["verdict"] == "wrong" and row["score"] > SURE]
    median = sorted(row["seconds"] for row in questions)[len(questions) // 2]
    return counts | {"of": len(questions), "wrong_and_sure": len(sure), "median_seconds": median}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="a tenth of the log, every third question: few minutes")
    parser.add_argument("--checkpoint", default=str(ROOT / "checkpoints" / "xc-smollm2-135m"), help="any model's name")
    arguments = parser.parse_args()
    require_clean(arguments.json)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
        code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))
        snippets = run([sys.executable, "-c", code], folder)
        make_files(folder / "files", 2_000 if arguments.quick else 20_000)
        store = folder / "corpus.xcs"
        added = run([XCLLAMA, "store", "add", str(store), "files", "--model", arguments.checkpoint, "--json"], folder)
        report = json.loads(added["output"])
        asked = QUESTIONS[:: 3 if arguments.quick else 1]
        questions = [ask(store, question, accepted, folder) for question, accepted in asked]
    figures = {
        "totals": totals(questions),
        "snippets": shown(snippets, "output"),
        "add": shown(added) | {"files": report["files"], "added": report["added"]},
        "questions": questions,
    }
    print(json.dumps(figures["totals"]))
    if arguments.json:
        write_result(arguments.json, figures, MEASURED)
    return int(bool(snippets["status"] or added["status"] or figures["totals"]["failed"]))


if __name__ == "__main__":
    sys.exit(main())
