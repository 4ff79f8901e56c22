"""An assembled folder loaded as a stranger would: in a new process, with empty caches, without this repository.

Each check is Python code that prints one line of JSON; what it prints is compared with the source.
"""

import inspect
import json
import os
import site
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

LOGITS_TOLERANCE = 0.1
# `python -S` and site-packages as a plain folder: the editable install of this repository is not seen
PRELUDE = """
import json, sys
sys.path.append({packages!r})
"""


def answer(model, processor, cache, question: str) -> dict[str, Any]:
    """What a model says to a question from the first row of `cache`; this very text runs in the clean process too."""
    import torch

    inputs, row = processor(text=[question], return_tensors="pt"), cache.select([0])
    with torch.no_grad():
        logits = model(**inputs, context_cache=row).logits[0, -1, :64].float()
    tokens = model.generate(**inputs, context_cache=row, max_new_tokens=8, do_sample=False)
    return {"tokens": tokens.tolist(), "logits": logits.tolist()}


MODEL = """
from typing import Any
from transformers import AutoModelForCausalLM, AutoProcessor
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
""" + inspect.getsource(answer)

MODEL_CHECK = (
    MODEL
    + """
cache = model.encode_context(**processor(contexts=[sys.argv[2]], return_tensors="pt"))
print(json.dumps(answer(model, processor, cache, sys.argv[3]) | {"base": model.base_digest()}))
"""
)


def answer_adapted(model, tokenizer, question: str) -> dict[str, Any]:
    """The same of an adapted decoder, which reads the prompt alone."""
    import torch

    messages, options = [{"role": "user", "content": question}], {"return_tensors": "pt", "return_dict": True}
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1, :64].float()
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return {"tokens": tokens.tolist(), "logits": logits.tolist()}


ADAPTER_CHECK = (
    """
from typing import Any
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[2]), sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
"""
    + inspect.getsource(answer_adapted)
    + "print(json.dumps(answer_adapted(model, tokenizer, sys.argv[3])))"
)

CONTEXT_CHECK = (
    MODEL
    + """
sys.path.append(sys.argv[5])
from xcllama.store import ContextStore
store = ContextStore.open(sys.argv[2], model, processor)
cache = store.get(store.ids()[: int(sys.argv[4])])
found = {"lengths": cache.lengths, "token_ids": cache.token_ids.tolist()}
print(json.dumps(answer(model, processor, cache, sys.argv[3]) | found))
"""
)

DATASET_CHECK = """
import hashlib, datasets
found = {}
for name in sys.argv[2:]:
    for split, rows in datasets.load_dataset(sys.argv[1], name).items():
        digest, count = hashlib.blake2b(digest_size=16), 0
        for count, row in enumerate(rows, 1):
            text = json.dumps(row, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
            digest.update(hashlib.blake2b(text, digest_size=16).digest())
        found.setdefault(name, {})[split] = {"rows": count, "fingerprint": digest.hexdigest()}
print(json.dumps(found))
"""

KERNEL_CHECK = """
from pathlib import Path
import kernels, torch
kernel = kernels.get_local_kernel(Path(sys.argv[1]))
sys.path.insert(0, sys.argv[2])
import xcllama_kernels
from xcllama_kernels.cases import random_case
assert kernel.__file__ != xcllama_kernels.__file__, kernel.__file__
arguments = random_case([40, 9], [0, 1, 0], 1).arguments
output, source = kernel.cross_attention(*arguments), xcllama_kernels.cross_attention(*arguments)
print(json.dumps({"names": sorted(kernel.__all__) == sorted(xcllama_kernels.__all__),
                  "same": torch.equal(output, source), "finite": bool(output.isfinite().all())}))
"""


def clean_python(code: str) -> list[str]:
    """The command that runs `code` with site-packages and without this repository."""
    packages = next(path for path in site.getsitepackages() if path.endswith("site-packages"))
    return [sys.executable, "-S", "-c", PRELUDE.format(packages=packages) + code]


def clean_environment(home: str) -> dict[str, str]:
    """The environment of a process whose home is the empty folder `home`; nothing is asked of the Hub."""
    environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    environment |= {"HOME": home, "HF_HOME": f"{home}/hf", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    # what is checked is published as it is: no compiled files beside the code
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    return environment | {"OMP_NUM_THREADS": str(torch.get_num_threads())}


def run_clean(code: str, *arguments: str, **variables: str) -> Any:
    """What `code` prints last, as JSON, from a process that sees site-packages and empty caches only.

    Args:
        arguments: `sys.argv[1:]`.
        variables: of its environment.

    Raises:
        ValueError: it failed; the message ends with its last line.
    """
    with tempfile.TemporaryDirectory() as home:
        environment = clean_environment(home) | variables
        command = [*clean_python(code), *arguments]
        done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"{(*arguments, 'the code')[0]} does not run in a clean process: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def require_equal(folder: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse a folder that does not do what its source does; logits may differ by what 16 bit rounds off.

    Raises:
        ValueError: they differ.
    """
    logits, wanted = found.get("logits", []), expected.get("logits", [])
    close = len(logits) == len(wanted)
    close = close and all(abs(one - other) <= LOGITS_TOLERANCE for one, other in zip(logits, wanted, strict=True))
    if not close or found | {"logits": wanted} != expected | {"logits": wanted}:
        raise ValueError(f"{folder} differs from its source: got {str(found)[:300]}, expected {str(expected)[:300]}.")
