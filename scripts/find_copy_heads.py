"""Show which layers of a decoder copy, to choose `context_layer` and `cross_attention_layers`.

python scripts/find_copy_heads.py [--model SmolLM2-135M-Instruct] [--results results/copy_heads.json]
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM

from modeling_xcllama.checkpoints import find_model
from xcllama.provenance import write_result
from xcllama.training.copy_heads import copy_scores, copying_layers

MEASURED = ("xcllama/training/copy_heads.py",)


def main() -> None:
    """Parse the command line, print a line a layer, and the blocks that follow from it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct", help="folder, Hub id, or name of a fetched model")
    parser.add_argument("--blocks", type=int, default=8, help="number of cross-attention blocks")
    parser.add_argument("--results", type=Path, help="also write the scores to this JSON")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(find_model(arguments.model), attn_implementation="eager").eval()
    scores = copy_scores(model)
    print("layer  copying (sum, best head)  previous token (best head)")
    for layer, (copying, previous) in enumerate(zip(scores["copying"], scores["previous_token"], strict=True)):
        print(f"{layer:5d}  {sum(copying):7.2f} {max(copying):7.2f}            {max(previous):7.2f}")
    layers = copying_layers(scores, arguments.blocks)
    # a block stands after a decoder layer, and starts from the projections of the one that follows
    print(f"cross_attention_layers: {[layer - 1 for layer in layers if layer]}")
    if arguments.results:
        write_result(arguments.results, {"model": arguments.model, "layers": layers, **scores}, MEASURED, seed=0)


if __name__ == "__main__":
    main()
