"""Everything beyond loading a model: training, evaluation and publishing."""
