"""The folder of each kind of Hub repository, made from this repository and checked against it in a clean process."""

import importlib.util
import json
import re
import shutil
import tempfile
from pathlib import Path

import fsspec
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from dataset_builders.building import build_mix_folder, read_table
from dataset_builders.card import render_card
from modeling_xcllama import ContextQuestionAnsweringPipeline, XCLlamaForCausalLM
from modeling_xcllama.checkpoints import find_model, is_added_weights
from modeling_xcllama.fingerprint import weights_digest
from xcllama.models import load_model
from xcllama.provenance import ROOT
from xcllama.publishing import checking
from xcllama.publishing.checking import answer, require_equal, run_clean
from xcllama.publishing.model_card import (
    DEFAULT,
    adapter_card,
    checkpoint_card,
    conversion_card,
    eval_results_yaml,
    evaluation_of,
    read_result,
)
from xcllama.publishing.rendering import check_card
from xcllama.publishing.running_space import ask, served_clean
from xcllama.store import ContextStore
from xcllama.store.manifest import render_card as render_context_card

TEXT = "The lighthouse of Skerrow was designed by Margaret Hale and finished in August 1838."
QUESTION = "Who designed the lighthouse?"
# of a corpus, compared in a clean process
CHECKED_DOCUMENTS = 16
# what an exported checkpoint has beside its weights, taken over as it is
RECORDS = ("training.json", "recipe.yaml", "curve.json", "curve.png")
# of an answer of the Space
SPACE_TOKENS = 48
# of the package xcllama, in the repository of a Space
SPACE_MODULES = ("__init__.py", "documents.py")
SPACE_FIELDS = ("title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "app_file", "license", "models")


def load_source(source: Path, base: str | None = None):
    """Model and processor of added weights or of a whole model's folder.

    Raises:
        ValueError: no weights, a base that cannot be found, or one with other weights than the added ones had.
    """
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} is no checkpoint: it has no config.json.")
    if not is_added_weights(source):
        if not list(source.glob("model*.safetensors")):
            raise ValueError(f"{source} has no weights: neither cross_attention.safetensors nor model.safetensors.")
        model = XCLlamaForCausalLM.from_pretrained(source, dtype="auto").eval()
        if base is not None:
            model.config.base_model_name_or_path = base
        if model.config.base_model_name_or_path is None:
            raise ValueError(f"{source}/config.json names no base model; give its Hub id with --base-model.")
        return model, AutoProcessor.from_pretrained(source, trust_remote_code=True)
    saved = json.loads((source / "config.json").read_text())
    try:
        model, processor = load_model(source, base)
    except OSError as error:
        names = [base or saved.get("base_model_name_or_path"), saved.get("encoder_name_or_path")]
        needed = " and ".join(name for name in names if name)
        raise ValueError(f"{source} belongs to {needed}, which cannot be found: run `make models`.") from error
    require_base(source, saved.get("base_model_digest"), model.base_digest())
    return model, processor


def require_base(source: Path, expected: str | None, found: str) -> None:
    """Refuse a base with other weights than the one that `source` was trained on.

    Raises:
        ValueError: their digests differ.
    """
    if expected not in (None, found):
        raise ValueError(f"{source} was trained on a base of digest {expected[:12]}, the one found has {found[:12]}.")


def assemble_model(
    source: Path, folder: Path, repo_id: str, results: Path, base: str | None = None, original: str | None = None
):
    """Code, merged weights, processor, generation config, card and `.eval_results`; returns model and processor.

    Args:
        source: a folder of checkpoints/ (added weights), or a whole converted model.
        folder: the new folder.
        base: Hub id of the base, where the config names none.
        original: of a converted model, where the original checkpoint came from.

    Raises:
        ValueError: as `load_source`, or a card with an empty slot.
    """
    model, processor = load_source(source, base)
    model.config.base_model_digest = model.base_digest()
    if model.config.encoder_config is not None:
        # not the folder of this machine that it was read from
        model.config.encoder_config._name_or_path = model.config.encoder_name_or_path
    if is_added_weights(source):
        card = checkpoint_card(source, model.config, results, repo_id)
    elif original is not None:
        card = conversion_card(repo_id.rpartition("/")[2], model.config, repo_id, original)
    else:
        raise ValueError(f"{source} is a whole model: say with --original where its checkpoint came from.")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if original is None:
        _add_records(source, folder, evaluation_of(source, results))
    (folder / "README.md").write_text(card)
    return model, processor


def _add_records(source: Path, folder: Path, evaluation: dict | None) -> None:
    """What an exported checkpoint has beside its weights, the licence of the code, and `.eval_results`."""
    for name in RECORDS:
        if (source / name).is_file():
            shutil.copy(source / name, folder)
    shutil.copy(ROOT / "LICENSE", folder)
    if entries := eval_results_yaml(evaluation, source.name):
        (folder / ".eval_results").mkdir()
        (folder / ".eval_results" / "xcllama.yaml").write_text(entries)


def check_model(folder: Path, model, processor) -> None:
    """The folder answers as the model does, token by token, and its base has the same weights."""
    cache = model.encode_context(**processor(contexts=[TEXT], return_tensors="pt"))
    expected = answer(model, processor, cache, QUESTION) | {"base": model.base_digest()}
    require_equal(folder, run_clean(checking.MODEL_CHECK, str(folder), TEXT, QUESTION), expected)


def assemble_adapter(source: Path, folder: Path, repo_id: str, results: Path):
    """An adapter of peft with its tokenizer and card; returns the adapted model, the tokenizer and the base's folder.

    Raises:
        ValueError: no weights, a base that cannot be found or has other weights than the adapter's had, or a card
            with an empty slot.
    """
    if not (source / "adapter_model.safetensors").is_file():
        raise ValueError(f"{source} has no weights: it has no adapter_model.safetensors.")
    card = adapter_card(source, results, repo_id)
    expected = json.loads((source / "training.json").read_text())["base_digest"]
    base = json.loads((source / "adapter_config.json").read_text())["base_model_name_or_path"]
    where = find_model(base)
    try:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(where), AutoTokenizer.from_pretrained(where)
    except OSError as error:
        raise ValueError(f"{source} belongs to {base}, which cannot be found: run `make models`.") from error
    require_base(source, expected, weights_digest(model.named_parameters(), sampled=True))
    tokenizer.chat_template = (source / "chat_template.jinja").read_text()
    tokenizer.save_pretrained(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(source / name, folder)
    # baselines are evaluated beside the checkpoint that is compared with them
    _add_records(source, folder, read_result(results, f"eval_{DEFAULT}"))
    (folder / "README.md").write_text(card)
    return PeftModel.from_pretrained(model, source).eval(), tokenizer, where


def check_adapter(folder: Path, model, tokenizer, base: str) -> None:
    """peft loads the folder in a clean process; it answers as the source does, token by token."""
    expected = checking.answer_adapted(model, tokenizer, QUESTION)
    require_equal(folder, run_clean(checking.ADAPTER_CHECK, str(folder), base, QUESTION), expected)


def assemble_context(source: Path, folder: Path, repo_id: str, model, processor, model_id: str, licence: str):
    """A corpus of cached contexts, as a snapshot.

    Args:
        source: a store that this model filled, or a folder of passages (JSON with title, source and text) to encode.
        model_id: what the card calls the model.
        licence: of the texts.

    Returns:
        The states of the first documents, as the store serves them.

    Raises:
        ValueError: nothing to publish there.
    """
    files = sorted(source.glob("*.json"))
    with tempfile.TemporaryDirectory() as new, ContextStore(new if files else source, model, processor) as store:
        if files:
            documents = [json.loads(file.read_text()) for file in files]
            metadata = [{name: document[name] for name in ("title", "source")} for document in documents]
            store.add([file.stem for file in files], [document["text"] for document in documents], metadata)
        if not len(store):
            raise ValueError(f"{source} holds neither passages (*.json) nor a store with documents.")
        store.catalogue.set_meta("model", model_id)
        manifest = store.snapshot(folder)
        cache = store.get(store.ids()[:CHECKED_DOCUMENTS])
    card = render_context_card(manifest, f"hf://datasets/{repo_id}", repo_id.rpartition("/")[2], licence)
    (folder / "README.md").write_bytes(card)
    check_card((folder / "README.md").read_text(), "context_card.md.jinja")
    return cache


def check_context(folder: Path, cache, model_folder: Path, model, processor) -> None:
    """A store opened on the folder in a clean process has the same states, and answers, as the one it came from."""
    expected = answer(model, processor, cache, QUESTION)
    expected |= {"lengths": cache.lengths, "token_ids": cache.token_ids.tolist()}
    # the store is no part of a model's repository: whoever reads a corpus has it installed
    arguments = str(model_folder), str(folder), QUESTION, str(CHECKED_DOCUMENTS), str(ROOT)
    require_equal(folder, run_clean(checking.CONTEXT_CHECK, *arguments), expected)


def assemble_dataset(build: str | None, folder: Path, repo_id: str) -> None:
    """A finished build with its card for the Hub.

    Args:
        build: folder or URL of what scripts/build_dataset.py made; None: the mix of the commercial sources on PyPI,
            made now.

    Raises:
        ValueError: no finished build.
    """
    if build is None:
        build_mix_folder(str(folder), commercial_only=True)
    else:
        read_table(build)
        filesystem, root = fsspec.core.url_to_fs(build)
        filesystem.get(root, str(folder), recursive=True)
    (folder / "README.md").write_text(render_card(read_table(str(folder)), repo_id))
    check_card((folder / "README.md").read_text(), "dataset_card.md.jinja")


def check_dataset(folder: Path) -> None:
    """`load_dataset` in a clean process reads every row of every configuration as it was written."""
    configs = read_table(str(folder))["configs"]
    fields = ("rows", "fingerprint")
    expected = {
        name: {split: {field: counts[field] for field in fields} for split, counts in config["splits"].items()}
        for name, config in configs.items()
    }
    require_equal(folder, run_clean(checking.DATASET_CHECK, str(folder), *configs), expected)


def assemble_kernel(folder: Path, repo_id: str, results: Path) -> None:
    """The kernel's repository (`kernels/assemble.py`), with the table of what the compiler makes of it."""
    # by path: `kernels` is the library, the folder of that name is no package
    spec = importlib.util.spec_from_file_location("assemble_kernels", ROOT / "kernels" / "assemble.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    table = results / "kernels_inspect.json"
    module.assemble(folder, table if table.is_file() else None, repo_id)
    check_card((folder / "README.md").read_text(), "kernels/CARD.md")


def check_kernel(folder: Path) -> None:
    """The kernel library loads it in a clean process; its result equals the source's, bit by bit, interpreted."""
    source = str(ROOT / "kernels" / "torch-ext")
    found = run_clean(checking.KERNEL_CHECK, str(folder), source, TRITON_INTERPRET="1")
    require_equal(folder, found, {"names": True, "same": True, "finite": True})


def copy_space(source: Path, folder: Path) -> None:
    """The files of a Space, with the part of this package that it uses: the reader of files."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    (folder / "xcllama").mkdir()
    for name in SPACE_MODULES:
        shutil.copy(ROOT / "xcllama" / name, folder / "xcllama")


def assemble_space(source: Path, folder: Path, model_id: str) -> None:
    """The Space with the model that it asks.

    Args:
        model_id: Hub id of the model, in place of those in the header.

    Raises:
        ValueError: no Space there, its header lacks what the Hub needs, a file is missing or does not compile.
    """
    if not (source / "app.py").is_file():
        raise ValueError(f"{source} holds no Space: it has no app.py.")
    for name in ("README.md", "requirements.txt"):
        if not (source / name).is_file():
            raise ValueError(f"the Space {source} has no {name}.")
    text = (source / "README.md").read_text()
    fields = check_card(text, "space/README.md")
    if missing := [field for field in SPACE_FIELDS if not fields.get(field)]:
        raise ValueError(f"the header of {source}/README.md lacks {', '.join(missing)}.")
    if not (source / fields["app_file"]).is_file():
        raise ValueError(f"{source}/README.md names the app {fields['app_file']}, which is not there.")
    copy_space(source, folder)
    own = re.sub(r"^models:\n(- .*\n)+", f"models:\n- {model_id}\n", text, count=1, flags=re.MULTILINE)
    (folder / "README.md").write_text(own)
    for path in folder.rglob("*.py"):
        try:
            compile(path.read_text(), str(path), "exec")
        except SyntaxError as error:
            raise ValueError(f"{path} does not compile: {error}.") from error


def check_space(folder: Path, model_folder: Path, model, processor) -> None:
    """Started in a clean process, the Space answers a question about a pasted text as the model itself does."""
    with served_clean(folder, model_folder) as url:
        found = ask(url, TEXT, QUESTION)
    answering = ContextQuestionAnsweringPipeline(model=model, processor=processor)
    expected = answering(QUESTION, contexts=TEXT, max_new_tokens=SPACE_TOKENS)["answers"][0]["answer"]
    # shown as a sentence, and cut where it ran out of tokens
    if not expected.lower().startswith(found.lower().rstrip(" ….")):
        raise ValueError(f"the Space {folder} answers {found!r}, the model itself {expected!r}.")
