"""The lm-eval model on a tiny checkpoint: against HFLM and the model called row by row; costs; refusals."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from evaluation_models import CONTEXTS, READS, choices, expanded, folders, generation, hflm, lm, plain, requests
from lm_eval.models.huggingface import HFLM
from transformers import LlamaForCausalLM


def close(ours, theirs) -> None:
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-4)


@pytest.mark.parametrize("pretrained", ["xc", "base"])
@pytest.mark.parametrize("mode", ["prompt", "prompt_kv"])
def test_prompt_modes_equal_hflm(lm, hflm, folders, mode, pretrained):
    ours = lm(mode, getattr(folders, pretrained))
    close(ours.loglikelihood(choices()), hflm.loglikelihood(choices(expanded)))
    assert ours.generate_until(generation()) == hflm.generate_until(generation(expanded))


def test_no_context_equals_hflm(lm, hflm):
    ours = lm("none")
    close(ours.loglikelihood(choices()), hflm.loglikelihood(choices()))
    assert ours.generate_until(generation()) == hflm.generate_until(generation())
    texts = requests("loglikelihood_rolling", lambda index: ("A text of many words. " * 40,))
    assert ours.loglikelihood_rolling(texts) == pytest.approx(hflm.loglikelihood_rolling(texts), abs=1e-3)


@torch.no_grad()
def row_by_row(model, index: int, continuation: str) -> float:
    """Log-likelihood from one call of the model for one row."""
    processor, net = model.processor, model.model
    inputs = processor(contexts=[CONTEXTS[i] for i in READS[index]], return_tensors="pt")
    cache = net.encode_context(**inputs)
    prompt, whole = model.tok_encode(plain(index)), model.tok_encode(plain(index) + continuation)
    logits = net(torch.tensor([whole]), context_cache=cache.join([range(len(cache))])).logits[0]
    return sum(logits[place - 1].log_softmax(-1)[whole[place]].item() for place in range(len(prompt), len(whole)))


def test_cross_equals_the_model_called_row_by_row(lm):
    ours = lm("cross")
    found = ours.loglikelihood(choices())
    expected = [row_by_row(ours, request.doc_id, request.args[1]) for request in choices()]
    assert [value for value, _ in found] == pytest.approx(expected, abs=1e-4)
    # the same question on other contexts is another request
    assert abs(found[0][0] - found[2][0]) > 1e-3
    assert found[0][0] != pytest.approx(lm("none").loglikelihood(choices())[0][0], abs=1e-3)


def test_cross_generates_what_single_rows_generate(lm):
    ours, single = lm("cross", batch_size=4), lm("cross", batch_size=1)
    answers = ours.generate_until(generation())
    assert answers == single.generate_until(generation())
    inputs = ours.processor(contexts=[CONTEXTS[0]], return_tensors="pt")
    ids = torch.tensor([ours.tok_encode(plain(0))])
    output = ours.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
        context_cache=ours.model.encode_context(**inputs),
    )  # fmt: skip
    assert ours.tok_decode(output[0, ids.shape[1] :]).split("\n")[0] == answers[0]


def test_rolling_reads_the_context(lm, hflm):
    texts = requests("loglikelihood_rolling", lambda index: ("Ann lives in Oslo.",))
    cross, prompt, none = (lm(mode).loglikelihood_rolling(texts) for mode in ("cross", "prompt", "none"))
    assert cross[0] != pytest.approx(none[0], abs=1e-3)
    assert cross[0] == pytest.approx(cross[3], abs=1e-4)
    assert prompt == pytest.approx(lm("prompt_kv").loglikelihood_rolling(texts), abs=1e-3)
    assert prompt[0] != pytest.approx(none[0], abs=1e-3)
    assert all(math.isfinite(value) for value in cross)


def test_cost_of_an_answer(lm):
    full = lm().generate_until(generation())
    tokens = [sum(len(CONTEXTS[i].encode()) for i in reads) for reads in READS]
    assert [answer.cost.context_tokens for answer in full] == tokens
    assert [answer.cost.cache_bytes for answer in full] == [count * 32 * 4 for count in tokens]
    assert [answer.cost.prompt_tokens for answer in full] == [len(plain(index)) for index in range(4)]
    for answer in full:
        assert 1 <= answer.cost.generated_tokens <= 6
        assert answer.cost.time_to_first_token > 0
    sizes = {
        dtype: lm(cache_dtype=dtype).generate_until(generation())[0].cost.cache_bytes
        for dtype in ("bfloat16", "int8", "int4")
    }
    assert full[0].cost.cache_bytes == 2 * sizes["bfloat16"] > 2 * sizes["int8"] > 2 * sizes["int4"]
    scored = lm().loglikelihood(choices())
    assert all(score.cost.time_to_first_token > 0 and score.cost.generated_tokens is None for score in scored)
    prefix = lm("prompt_kv").generate_until(generation())
    # two of keys and values, 4 layers, 2 heads, width 8, 4 bytes
    head = len("Question: ") + len(CONTEXTS[0]) + 2
    assert prefix[0].cost.cache_bytes == head * 2 * 4 * 2 * 8 * 4
    assert [answer.cost.cache_hit for answer in prefix] == [False, False, False, True]
    assert prefix[0].cost.context_tokens == len(CONTEXTS[0]) + 2


def test_peft_adapter_in_prompt_mode(lm, folders, tmp_path, hflm):
    from peft import LoraConfig, get_peft_model

    base = LlamaForCausalLM.from_pretrained(folders.base)
    adapter = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "adapter")
    theirs = HFLM(pretrained=folders.base, peft=str(tmp_path / "adapter"), device="cpu", dtype="float32")
    for ours in (lm("prompt", str(tmp_path / "adapter")), lm("prompt", folders.base, peft=str(tmp_path / "adapter"))):
        close(ours.loglikelihood(choices()), theirs.loglikelihood(choices(expanded)))
    (tmp_path / "adapter" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    adapted = lm("prompt", str(tmp_path / "adapter"))
    assert adapted.apply_chat_template([{"role": "user", "content": "Hi"}]) == "Hi!"
    assert theirs.loglikelihood(choices()[:1])[0] != hflm.loglikelihood(choices()[:1])[0]


def test_long_prompts_are_refused_or_cut(lm):
    long = generation()
    long[1].doc["contexts_list"] = ["word " * 200]
    with pytest.raises(ValueError, match="document 1 of task 'task' has .* tokens.*truncation=True"):
        lm("prompt").generate_until(long)
    answers = lm("prompt", truncation=True).generate_until(long)
    assert answers[1].cost.prompt_tokens <= 512 - 6
    assert answers[1].cost.context_tokens > 300
    assert answers[0] == lm("prompt").generate_until(generation())[0]
    # the cache has no such limit
    assert lm("cross").generate_until(long)[1].cost.context_tokens == 1000


def test_chat_template_of_a_checkpoint_goes_first(lm, folders, tmp_path):
    import shutil

    shutil.copytree(folders.xc, tmp_path / "xc")
    (tmp_path / "xc" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    assert lm(pretrained=str(tmp_path / "xc")).apply_chat_template([{"role": "user", "content": "Hi"}]) == "Hi!"
    assert lm().apply_chat_template([{"role": "user", "content": "Hi"}]) == "<user>Hi<assistant>"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "crosswise"}, "`context_mode` must be one of cross, cross_shuffled, prompt"),
        ({"mode": "prompt", "cache_dtype": "int8"}, "leave them out with context_mode=prompt"),
        ({"cache_dtype": "int2"}, "`cache_dtype` must be one of auto"),
        ({"batch_size": "auto"}, "`batch_size` must be a number"),
        ({"mode": "cross", "pretrained": "base"}, "needs a model with cross-attention"),
        ({"mode": "prompt", "pretrained": "base", "base": "x"}, "`base` is for folders of added weights"),
    ],
)
def test_bad_arguments(lm, folders, arguments, message):
    if "pretrained" in arguments:
        arguments = arguments | {"pretrained": getattr(folders, arguments["pretrained"])}
    with pytest.raises(ValueError, match=message):
        lm(**arguments)


def test_documents_without_contexts_or_question(lm):
    bare = generation()
    bare[2].doc["contexts_list"] = []
    with pytest.raises(ValueError, match="document 2 of task 'task' has no contexts.*context_mode=none"):
        lm().generate_until(bare)
    strange = generation(lambda index: "nothing of the kind")
    with pytest.raises(ValueError, match="does not hold its `question`"):
        lm("prompt").generate_until(strange)


REMOTE = """
import sys
from lm_eval.api.instance import Instance
from xcllama.evaluation.model import XCLlamaLM
lm = XCLlamaLM(sys.argv[1], "cross", device="cpu", dtype="float32", trust_remote_code=True)
assert type(lm.model).__module__.startswith("transformers_modules"), type(lm.model).__module__
document = {"question": "Where?", "contexts_list": [sys.argv[2]], "history": []}
request = Instance("loglikelihood", document, (sys.argv[3], " Oslo."), 0, metadata=("task", 0, 1))
print("score", lm.loglikelihood([request])[0][0])
"""


def test_a_whole_model_repo_by_remote_code(lm, tmp_path):
    local = lm()
    local.model.save_pretrained(tmp_path / "repo")
    local.processor.save_pretrained(tmp_path / "repo")
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, str(tmp_path / "repo"), CONTEXTS[0], plain(0)],
        capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("score")]
    expected = local.loglikelihood(requests("loglikelihood", lambda index: (plain(index), " Oslo.")))[0][0]
    assert float(line.split()[1]) == pytest.approx(expected, abs=1e-4)
