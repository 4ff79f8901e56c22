"""The project's evaluation: lm-eval models, context question-answering tasks, and tables of their results.

    xcllama eval run --model xcllama --model_args pretrained=FOLDER,context_mode=cross --tasks xc_offline

To add a task: a YAML in tasks/ that names a source of `dataset_builders`, and its line in a group's YAML.
To add a metric: a function in metrics.py, its entry in `ANSWER_METRICS`, and a test of hand-worked cases.
"""
