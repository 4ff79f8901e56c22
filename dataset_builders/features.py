"""The row schema as `datasets` knows it."""

import datasets

FEATURES = datasets.Features(
    {
        "sample_idx": datasets.Value("string"),
        "dataset": datasets.Value("string"),
        "titles_list": datasets.List(datasets.Value("string")),
        "contexts_list": datasets.List(datasets.Value("string")),
        "useful_contexts": datasets.List(datasets.Value("int32")),
        "question": datasets.Value("string"),
        "history": datasets.List({"question": datasets.Value("string"), "answer": datasets.Value("string")}),
        "answer": datasets.Value("string"),
        "answers": datasets.List(datasets.Value("string")),
        "answerable": datasets.Value("bool"),
        "question_type": datasets.Value("string"),
    }
)
