# every target does its own set-up: Python 3.11, make and gcc are all that must be there
PYTHON ?= python3.11
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: demo serve-demo newcomer test test-portable test-slow test-browser space bench bench-quick lint style models fuzz kernels-inspect gpu-check train-small train-smoke evaluate-dev evaluate-test ablations publish-dry-run clean

# torch without CUDA, a tenth of the size, where there is no GPU and its index can be reached
TORCH_INDEX = $(shell command -v nvidia-smi >/dev/null || { curl -sf -m 5 -o /dev/null \
	https://download.pytorch.org/whl/cpu/torch/ && echo --extra-index-url https://download.pytorch.org/whl/cpu; })
INSTALL = $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt $(TORCH_INDEX)

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) -e ".[dev]"
	touch $@ .venv/.demo

# what `make demo` needs: a fraction of the rest
.venv/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -e ".[demo]"
	touch $@

models: .venv/.installed
	$(BIN)/python scripts/fetch_models.py

demo: .venv/.demo
	$(BIN)/python scripts/fetch_models.py HuggingFaceTB/SmolLM2-135M-Instruct
	$(BIN)/python scripts/demo.py

# what a newcomer meets: the README's snippets, the commands on mixed files, questions with known answers; a quarter of an hour
newcomer: models
	$(BIN)/python scripts/newcomer.py --json results/newcomer.json

serve-demo: models
	$(BIN)/python scripts/serve_demo.py

test: models
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -q

# the whole suite as other processors would run it: half an hour on two cores. What a CPU lacks it does not get from here
PORTABLE = "ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OPENBLAS_CORETYPE=Prescott OMP_NUM_THREADS=1" \
	"ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell OMP_NUM_THREADS=2" \
	"OPENBLAS_CORETYPE=Zen XCLLAMA_WIDE_PRODUCTS=always OMP_NUM_THREADS=1"

test-portable: models
	for settings in $(PORTABLE); do echo "$$settings"; env $$settings TRITON_INTERPRET=1 $(BIN)/pytest -n 2 -q || exit 1; done

# the extra is not in `dev`: torchao and bitsandbytes log at every import on machines without a GPU
test-slow: models
	$(BIN)/pip install -q -c constraints.txt -e ".[quantization]"
	TRITON_INTERPRET=1 OMP_NUM_THREADS=2 $(BIN)/pytest -q -m slow --timeout 3600

# Debian's chromium, installed where apt-get is; tests say that they are skipped where it is not
test-browser: models
	@command -v chromium >/dev/null || ! command -v apt-get >/dev/null || { apt-get update -q && \
		apt-get install -y -q --no-install-recommends chromium fonts-dejavu-core; }
	$(BIN)/pip install -q -c constraints.txt -e ".[browser]"
	$(BIN)/pytest -q -rs -m browser tests/test_space_browser.py

space: models
	$(BIN)/python scripts/run_space.py

# on two quiet cores: 20 minutes, and under 5
bench: models
	$(BIN)/pip install -q -c constraints.txt -e ".[bench]"
	$(BIN)/python scripts/benchmark.py

bench-quick: models
	$(BIN)/pip install -q -c constraints.txt -e ".[bench]"
	$(BIN)/python scripts/benchmark.py --quick --results runs/benchmark_quick/benchmark.json --plots runs/benchmark_quick

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# twelve minutes; ends with an error on a finding
fuzz: .venv/.installed
	$(BIN)/pip install -q -c constraints.txt -e ".[fuzz]"
	OMP_NUM_THREADS=1 $(BIN)/python scripts/fuzz_context_cache.py --seconds 600 --output results/fuzz_context_cache.json
	OMP_NUM_THREADS=1 $(BIN)/python scripts/fuzz_inputs.py --seconds 120 --output results/fuzz_inputs.json

# compiles for four chips, no GPU needed; what was compiled from the same code before is not compiled again
kernels-inspect: .venv/.installed
	$(BIN)/python kernels/benchmarks/inspect_kernels.py --output results/kernels_inspect.json

# on a machine with a GPU: ends before 9 minutes are over
gpu-check: models
	$(BIN)/python scripts/gpu_check.py --output results/gpu

# hours on one core: (a) in three stages, then (b) and (c) out of it; an interrupted run goes on where it stopped
train-small: models
	for name in lora-prompt xc-smollm2-135m-joint xc-smollm2-135m \
			xc-smollm2-135m-block-short xc-smollm2-135m-block-joined xc-smollm2-135m-block \
			xc-smollm2-135m-condensed-short xc-smollm2-135m-condensed-joined xc-smollm2-135m-condensed \
			xc-enc-minilm-short xc-enc-minilm-repeated xc-enc-minilm-drawn xc-enc-minilm; do \
		train="env OMP_NUM_THREADS=1 $(BIN)/xcllama train $$name"; \
		resume=; if [ -e runs/$$name/recipe.json ]; then resume=--resume; fi; \
		$$train $$resume || exit 1; \
		case $$name in *-short|*-joined|*-joint|*-repeated|*-drawn) continue;; esac; \
		$$train --no-training --export checkpoints/$$name --results results || exit 1; \
	done

# choices, and what the checkpoints decline below, look at dev alone; test runs once a release. What was answered before is not again
COMPARE = OMP_NUM_THREADS=1 $(BIN)/xcllama eval compare --checkpoint checkpoints/xc-smollm2-135m \
	--checkpoint checkpoints/xc-smollm2-135m-condensed --checkpoint checkpoints/xc-enc-minilm \
	--lora-prompt checkpoints/lora-prompt --lora-closed-book checkpoints/lora-closed-book

evaluate-dev: models
	$(COMPARE) --split dev --store-threshold --results runs/compare

evaluate-test: models
	$(COMPARE) --split test --results results

# an hour and a half on one core; what was trained and evaluated before is not again
ablations: models
	OMP_NUM_THREADS=1 $(BIN)/python scripts/run_ablations.py

train-smoke: models
	rm -rf runs/smoke
	OMP_NUM_THREADS=1 $(BIN)/xcllama train smoke --export runs/smoke/export

# everything but the upload; with a token (HF_TOKEN) compared with what is on the Hub
publish-dry-run: models
	$(BIN)/xcllama publish all --namespace xcllama --dry-run

clean:
	rm -rf .venv build dist *.egg-info
