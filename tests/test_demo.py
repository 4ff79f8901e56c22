"""scripts/demo.py on one document, with the trained checkpoint: it reports what was asked, found and answered."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_most_questions_are_answered_from_the_cache_in_a_new_process(tmp_path):
    documents, report = tmp_path / "documents", tmp_path / "demo.json"
    documents.mkdir()
    shutil.copy(ROOT / "scripts" / "passages" / "lighthouse.json", documents)
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--passages", str(documents), "--json", str(report)]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=500).stdout
    assert "a new process now answers" in printed
    document = json.loads((documents / "lighthouse.json").read_text())
    [row] = json.loads(report.read_text())["documents"]
    paragraphs = document["text"].split("\n\n")
    assert row["document"] == "lighthouse"
    assert row["passages"] == len(paragraphs)
    # 16-bit states of layer 18: 576 values a token
    assert row["bytes_per_token"] == 1152
    asked = [(item["question"], item["expected"]) for item in row["answers"]]
    assert asked == [tuple(pair) for pair in document["questions"]]
    for item in row["answers"]:
        number = int(item["passage"].removeprefix("lighthouse-"))
        assert item["expected"] in paragraphs[number - 1]
    right = sum(item["right"] for item in row["answers"])
    assert 2 * right >= len(row["answers"])
    assert f"{right} of {len(row['answers'])} answers hold what is expected." in printed
