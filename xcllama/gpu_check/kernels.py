"""The kernels: every `gpu` test, then their times beside what else there is."""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from xcllama.gpu_check.options import MEASURED, Options
from xcllama.provenance import ROOT, write_result

TESTS = ROOT / "tests" / "test_kernels_gpu.py"
BENCHMARK = ROOT / "kernels" / "benchmarks" / "benchmark.py"
# of the part's time, what the tests may take
TEST_SHARE = 0.6


def check_kernels(options: Options) -> int:
    """Run tests and benchmark; 0 if all tests passed and all kernels were right."""
    tests = run_tests(TEST_SHARE * options.left, options.dry_run)
    write_result(options.output / "kernel_tests.json", summary(tests), MEASURED)
    command = [sys.executable, str(BENCHMARK), "--output", str(options.output / "kernels.json")]
    command += ["--seconds", f"{options.left:.1f}", *(["--dry-run"] if options.dry_run else [])]
    benchmark = subprocess.run(command, cwd=ROOT).returncode
    failed = [test["name"] for test in tests if test["outcome"] == "failed"]
    print(f"{len(tests)} tests, {len(failed)} failed: {', '.join(failed) or 'none'}", flush=True)
    return 1 if failed or not tests or benchmark else 0


def run_tests(seconds: float, dry_run: bool) -> list[dict]:
    """Outcome, seconds and recorded figures of every test that ended within `seconds`."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        # no settings, no fixtures of other tests, and no root on the path, where kernels/ would shadow another package
        command = [sys.executable, *"-P -m pytest -q --noconftest -p no:cacheprovider -W ignore".split()]
        command += ["-c", os.devnull, "--rootdir", str(ROOT), f"--junitxml={report}", str(TESTS)]
        if not dry_run and importlib.util.find_spec("xdist"):
            # kernels are compiled on all cores
            command += ["-n", str(max(1, min(8, (os.cpu_count() or 2) // 2)))]
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            # pytest writes its report when it is interrupted
            process.send_signal(signal.SIGINT)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return read_report(report) if report.is_file() else []


def read_report(report: Path) -> list[dict]:
    """The tests of a JUnit report."""
    tests = []
    for case in ElementTree.parse(report).iter("testcase"):
        found = {name: case.find(name) for name in ("failure", "error", "skipped")}
        broken = found["failure"] if found["failure"] is not None else found["error"]
        outcome = "failed" if broken is not None else "skipped" if found["skipped"] is not None else "passed"
        test = {"name": case.get("name"), "outcome": outcome, "seconds": float(case.get("time", 0))}
        test |= {item.get("name"): float(item.get("value")) for item in case.iter("property")}
        if broken is not None:
            test["message"] = (broken.get("message") or "").splitlines()[:1]
        tests.append(test)
    return tests


def summary(tests: list[dict]) -> dict:
    """Counts by outcome, and the tests."""
    outcomes = ("passed", "failed", "skipped")
    return {name: sum(test["outcome"] == name for test in tests) for name in outcomes} | {"tests": tests}
