"""On what terms each source comes, and where from; the cards of the published data sets are made of this."""

from typing import Any

_COQA = {
    "citation": "Reddy et al., CoQA: A Conversational Question Answering Challenge, TACL 2019",
    "homepage": "https://stanfordnlp.github.io/coqa/",
    "hub_id": "stanfordnlp/coqa",
}

# evaluation_only: all rows are test rows, nothing may be trained on
TERMS: dict[str, dict[str, Any]] = {
    "coqa": {
        "licence": "CC BY-SA 4.0 (Wikipedia, Gutenberg), Apache-2.0 (CNN)",
        "commercial": True,
        "evaluation_only": False,
        "note": "development set, the stories from Wikipedia, Project Gutenberg and CNN",
        **_COQA,
    },
    "coqa_school": {
        "licence": "RACE and MCTest terms (MSR-LA): research use only",
        "commercial": False,
        "evaluation_only": False,
        "note": "development set of CoQA, the stories from RACE and MCTest",
        **_COQA,
    },
    "boolq": {
        "licence": "CC BY-SA 3.0",
        "commercial": True,
        "evaluation_only": False,
        "citation": "Clark et al., BoolQ: Exploring the Surprising Difficulty of Natural Yes/No Questions, 2019",
        "homepage": "https://github.com/google-research-datasets/boolean-questions",
        "hub_id": "google/boolq",
        "note": "validation set",
    },
    "drop": {
        "licence": "CC BY-SA 4.0",
        "commercial": True,
        "evaluation_only": False,
        "citation": "Dua et al., DROP: A Benchmark Requiring Discrete Reasoning Over Paragraphs, NAACL 2019",
        "homepage": "https://allenai.org/data/drop",
        "hub_id": "ucinlp/drop",
        "note": "a sample of 1,000 questions",
    },
    "sciq": {
        "licence": "CC BY-NC 3.0",
        "commercial": False,
        "evaluation_only": False,
        "citation": "Welbl et al., Crowdsourcing Multiple Choice Science Questions, W-NUT 2017",
        "homepage": "https://allenai.org/data/sciq",
        "hub_id": "allenai/sciq",
        "note": "a set of 1,000 questions, those that have a supporting passage",
    },
    "biomedical": {
        "licence": "CC BY 2.5 (BioASQ), MIT (PubMedQA), ODC-BY (SciRIFF, the collection)",
        "commercial": True,
        "evaluation_only": True,
        "citation": "Tsatsaronis et al., BioASQ, 2015; Jin et al., PubMedQA, 2019; Wadden et al., SciRIFF, 2024",
        "homepage": "https://huggingface.co/datasets/allenai/SciRIFF",
        "hub_id": "allenai/SciRIFF",
        "note": "yes/no questions with abstracts; out of distribution, so for evaluation only",
    },
    "qasper": {
        "licence": "CC BY 4.0",
        "commercial": True,
        "evaluation_only": False,
        "citation": "Dasigi et al., Information-Seeking Questions Anchored in Research Papers, NAACL 2021",
        "homepage": "https://allenai.org/data/qasper",
        "hub_id": "allenai/qasper",
        "note": "yes/no questions on whole papers",
    },
    "squad_sample": {
        "licence": "CC BY-SA 4.0",
        "commercial": True,
        "evaluation_only": True,
        "citation": "Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, EMNLP 2016",
        "homepage": "https://rajpurkar.github.io/SQuAD-explorer/",
        "hub_id": "rajpurkar/squad",
        "note": "1,000 questions of the v1.1 development set, never trained on",
    },
}
