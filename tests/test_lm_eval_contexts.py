"""Contexts of an evaluation: encoded once, kept on disk in any dtype, shared by processes, shuffled as a control."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from evaluation_models import CONTEXTS, choices, folders, generation, lm, save_base

from modeling_xcllama import XCLlamaForCausalLM
from xcllama.evaluation.contexts import contexts_of, other_contexts


def count_encoded(monkeypatch, model) -> list[int]:
    counts, encode = [], model.model.encode_context

    def counting(ids, mask=None):
        counts.append(len(ids))
        return encode(ids, mask)

    monkeypatch.setattr(model.model, "encode_context", counting)
    return counts


def test_each_context_is_encoded_once_and_kept_on_disk(lm, tmp_path, monkeypatch):
    first = lm(context_cache_dir=str(tmp_path / "kept"))
    counts = count_encoded(monkeypatch, first)
    answers = first.generate_until(generation())
    scores = first.loglikelihood(choices())
    assert sum(counts) == len(CONTEXTS)
    assert [answer.cost.cache_hit for answer in answers] == [False, False, True, True]
    assert all(score.cost.cache_hit for score in scores)
    second = lm(context_cache_dir=str(tmp_path / "kept"))
    counts = count_encoded(monkeypatch, second)
    again = second.generate_until(generation())
    assert counts == []
    assert again == answers
    assert all(answer.cost.cache_hit for answer in again)
    assert second.get_model_info()["contexts_from_folder"] == len(CONTEXTS)


@pytest.mark.parametrize("kept", [False, True], ids=["memory", "folder"])
def test_two_processes_encode_each_context_once_and_shuffle_alike(lm, tmp_path, monkeypatch, kept):
    """Two models in two threads, their lists exchanged at a barrier as accelerate exchanges them between processes."""
    barrier, slots = threading.Barrier(2), [None, None]

    def gather(rank, items):
        slots[rank] = items
        barrier.wait()
        found = [*slots[0], *slots[1]]
        barrier.wait()
        return found

    options = {"context_cache_dir": str(tmp_path / "kept")} if kept else {}
    models = [lm("cross_shuffled", **options) for _ in range(2)]
    counts = [count_encoded(monkeypatch, model) for model in models]
    for rank, model in enumerate(models):
        model._gather = model.pool.gather = partial(gather, rank)
        model.pool.rank = rank
    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(lambda rank: models[rank].generate_until(generation()[rank::2]), range(2)))
    alone = lm("cross_shuffled")
    answers = alone.generate_until(generation())
    assert [halves[0][0], halves[1][0], halves[0][1], halves[1][1]] == answers
    # each of them encoded something, and together no more than one model alone
    encoded = alone.get_model_info()["contexts_encoded"]
    assert sum(counts[0]) + sum(counts[1]) == encoded
    assert all(counts)
    assert [model.get_model_info()["contexts_encoded"] for model in models] == [encoded] * 2


def test_one_folder_serves_every_dtype(lm, tmp_path, monkeypatch):
    folder = str(tmp_path / "kept")
    lm(context_cache_dir=folder).generate_until(generation())
    for dtype in ("int8", "bfloat16"):
        kept = lm(context_cache_dir=folder, cache_dtype=dtype)
        counts = count_encoded(monkeypatch, kept)
        assert kept.loglikelihood(choices()) == lm(cache_dtype=dtype).loglikelihood(choices())
        assert counts == []
        assert kept.get_model_info()["cache_dtype"] == dtype
    # what is kept is in full precision, whatever dtype the first run read
    small = str(tmp_path / "small")
    lm(context_cache_dir=small, cache_dtype="int8").generate_until(generation())
    full = lm(context_cache_dir=small)
    assert full.generate_until(generation()) == lm().generate_until(generation())
    assert full.get_model_info()["contexts_encoded"] == 0


def test_cut_contexts_never_serve_as_whole_ones(lm, tmp_path):
    folder = str(tmp_path / "kept")
    cut = lm(context_cache_dir=folder, truncation=True)
    cut.processor.context_max_length = 8
    whole, alone = lm(context_cache_dir=folder), lm()
    assert cut.loglikelihood(choices()) != alone.loglikelihood(choices())
    assert whole.loglikelihood(choices()) == alone.loglikelihood(choices())


def test_a_folder_of_another_model_is_refused(lm, tmp_path):
    lm(context_cache_dir=str(tmp_path / "kept")).generate_until(generation())
    other = XCLlamaForCausalLM.from_decoder(save_base(tmp_path / "other", seed=9), context_layer=2)
    other.save_cross_attention(tmp_path / "other_xc")
    with pytest.raises(ValueError, match="context_cache_dir.*fingerprint"):
        lm(pretrained=str(tmp_path / "other_xc"), context_cache_dir=str(tmp_path / "kept"))


def test_quantized_caches_change_little(lm):
    exact = [value for value, _ in lm().loglikelihood(choices())]
    int8 = [value for value, _ in lm(cache_dtype="int8").loglikelihood(choices())]
    assert int8 != exact
    assert int8 == pytest.approx(exact, abs=0.5)


def test_shuffled_contexts_are_those_of_another_document(lm):
    instances = generation()
    other = other_contexts(instances, seed=0)
    assert other == other_contexts(instances, seed=0)
    for request, texts in zip(instances, other, strict=True):
        assert not set(texts) & set(contexts_of(request))
        assert texts in {contexts_of(each) for each in instances}
    shuffled = lm("cross_shuffled").loglikelihood(choices())
    cross = lm("cross").loglikelihood(choices())
    assert all(abs(wrong[0] - right[0]) > 1e-5 for wrong, right in zip(shuffled, cross, strict=True))


def test_shuffling_needs_another_document():
    with pytest.raises(ValueError, match="no other context for document 0"):
        other_contexts(generation()[:1], seed=0)
