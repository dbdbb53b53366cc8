# make install | demo | demo-all | reproduce-demo | test | cases | journeys | stress | bench | lint | clean
# make stress        hurts trainings in every way that we know, on the CPU, and counts what they survive (10 minutes)
# make browser-check the page of tools/browse.py in a browser
# make package       builds an sdist and a wheel and tries both; make docker-check runs the Dockerfile's lines without Docker
# make docs          builds the site of the documentation; make notebook runs docs/demo.ipynb
# make sanitize      runs the CPU tests of the compiled op under AddressSanitizer and UndefinedBehaviorSanitizer, and the
#                    CUDA kernels, compiled for the CPU, also under ThreadSanitizer (GCC)
# make cuda-check    compiles the CUDA code; needs no GPU
# make gpu-check     tests the compiled op on this machine's GPU, with and without compute-sanitizer
# PYTHON=python3.12 make install   makes a new .venv with this interpreter (`make clean` removes the old one)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
REQUIREMENTS := $(VENV)/.requirements
STAMP := $(VENV)/.installed
CSRC := $(shell find dimaskdino/layers/csrc -type f)
# Architectures of `make cuda-check`; toolkits older than CUDA 13 also know 7.0.
CUDA_ARCHS ?= 7.5;8.0;9.0;10.0

.PHONY: install demo demo-all reproduce-demo test cases journeys stress bench browser-check package docker-check docs notebook \
    sanitize sanitize-memory sanitize-threads cuda-check gpu-check lint clean

install: $(STAMP)

# Both rules run again only when one of their files changes, and then pip keeps what is up to date.
# setuptools and wheel come first, because fvcore, iopath, and antlr4 have no wheels and are built with the pinned ones.
$(REQUIREMENTS): requirements.txt tools/install_detectron2.py tools/detectron2_wheel.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: dimaskdino needs Python 3.10 or newer, and $(PYTHON) is %d.%d: run PYTHON=/path/to/python3 make install" % sys.version_info[:2])'
	@echo "== [1/4] virtual environment $(VENV)"
	$(BIN)/python -m pip --version 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@echo "== [2/4] requirements.txt (several gigabytes the first time, mostly torch)"
	$(BIN)/python -m pip install $$(grep -E '^(pip|setuptools|wheel)==' requirements.txt)
	$(BIN)/python -m pip install --no-build-isolation -r requirements.txt
	@echo "== [3/4] detectron2"
	$(BIN)/python tools/install_detectron2.py
	@touch $@

# After a change in the C++ files, ninja compiles only what they affect.
$(STAMP): $(REQUIREMENTS) setup.py tools/build_op.py $(CSRC)
	@echo "== [4/4] dimaskdino and its compiled op (a minute or two the first time)"
	$(BIN)/python -m pip install --no-build-isolation -e .
	@$(BIN)/python -c 'import dimaskdino.layers.ms_deform_attn_ops as op; print("== deformable attention:", op.MISSING or "compiled for the CPU" + " and CUDA" * op.has_kernels("cuda"))'
	@touch $@
	@echo "== installed; 'make demo' and 'make test' are next"

demo: $(STAMP)
	$(BIN)/python tools/demo.py

# A model of every task, one after the other: boxes, instances, panoptic, semantic. It goes on where it stopped.
demo-all: $(STAMP)
	$(BIN)/python tools/demo.py --all

# The paper's Table 4 and Figure 1 on synthetic pictures: four trainings shorter than the demo's, on the CPU.
reproduce-demo: $(STAMP)
	$(BIN)/python tools/reproduce.py table4 figure1 --dataset shapes --num-gpus 0 --run

# A process per core, each of which runs whole files: their fixtures are made once.
TEST_PROCESSES ?= auto
test: $(STAMP)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --maxprocesses 4 --dist loadfile

# Runs all users' reports of tests/data/cases, including those that train a model, in under five minutes on a CPU.
cases: $(STAMP)
	$(BIN)/python -m pytest -m cases

stress: $(STAMP)
	$(BIN)/python -m tests.stress

# The page of tools/browse.py in the system's Chromium; says so and skips where there is none. gradio wants an older Pillow
# than requirements.txt, so it gets an environment of its own, which takes the other packages from $(VENV).
BROWSER := build/browser
$(BROWSER)/.installed: $(STAMP)
	$(BIN)/python -m venv --clear $(BROWSER)
	$(BROWSER)/bin/python -m pip install --quiet "gradio>=6,<7" playwright==1.65.2
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	    "$$($(BROWSER)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_$(VENV).pth"
	@touch $@
browser-check: $(BROWSER)/.installed
	$(BROWSER)/bin/python -m pytest -q -rs -m browser tests/cli/test_browse.py

# Whole ways of users, from their labels to their results, with modules of their own: minutes on a CPU.
journeys: $(STAMP)
	$(BIN)/python -m pytest tests/journeys/journey_*.py

# An sdist and a wheel in build/dist, checked. The wheel's op takes the objects of the installed one. What an earlier build
# left in build/lib would get into the wheel.
package: $(STAMP)
	rm -rf build/lib* build/bdist.* build/dist
	$(BIN)/python -m build --quiet --no-isolation --sdist --wheel --outdir build/dist
	$(BIN)/python -m pytest -q -m package tests/test_package.py

# The RUN lines of the Dockerfile in a copy of the repository with an environment of its own: gigabytes, minutes.
docker-check: $(STAMP)
	$(BIN)/python -m pytest -q -s -m docker tests/test_dockerfile.py

# The pages of docs/ and the API in build/site; a warning is an error.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -r docs/requirements.txt
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --fresh-env docs build/site

# docs/demo.ipynb with its outputs, as build/demo.ipynb.
notebook: $(STAMP)
	$(BIN)/python -m pip install --quiet nbclient==0.11.0 nbformat==5.11.1 "ipykernel>=6.31,<8"
	mkdir -p build
	$(BIN)/jupyter-execute --output=../build/demo docs/demo.ipynb

bench: $(STAMP)
	$(BIN)/python -m benchmarks.ms_deform_attn

# Python is not built with the sanitizer, so load its runtime first, and libstdc++ with it, or the first C++ exception is
# an error. Leak detection is off, because Python does not free everything at exit. pytest must not capture the report.
# g++ compiles the CUDA kernels for the CPU, and ThreadSanitizer finds races between their threads; if it reports an
# "unexpected memory mapping", run `setarch -R make sanitize`. torch runs one thread, because ThreadSanitizer does not see
# into its threading library; tests of float64, whose threads do what those of float32 do, and of rounding are left out.
SANITIZED := build/sanitize/tree
# Compiling takes longer than running: without optimization and with line numbers alone it takes a quarter.
SANITIZER_FLAGS := -O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize: sanitize-memory sanitize-threads  # `make -j2 --output-sync=target sanitize` runs both at once
sanitize-memory: export ASAN_OPTIONS := detect_leaks=0
sanitize-memory: export UBSAN_OPTIONS := print_stacktrace=1
sanitize-memory: export EMULATION_OBJECTS := $(CURDIR)/build/emulation
sanitize-memory: PRELOAD = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)"
sanitize-memory: $(STAMP)
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r pyproject.toml dimaskdino benchmarks tests tools $(SANITIZED)
	DIMASKDINO_SANITIZE=1 DIMASKDINO_BUILD_OP=1 FORCE_CUDA=0 $(BIN)/python setup.py build_ext \
	    --build-temp build/sanitize/objects --build-lib $(SANITIZED)
	cd $(SANITIZED) && $(PRELOAD) "$(CURDIR)/$(BIN)/python" -c 'import torch, dimaskdino._C'
	cd $(SANITIZED) && $(PRELOAD) EMULATION_FLAGS="$(SANITIZER_FLAGS)" "$(CURDIR)/$(BIN)/python" -m pytest -q -s \
	    tests/layers/test_ms_deform_attn*.py tests/layers/test_points.py tests/modeling/postprocessing/test_resized.py \
	    tests/data_pipeline/test_images.py::test_windows_of_resized_images_are_those_of_detectron2

sanitize-threads: $(STAMP)
	LD_PRELOAD="$$($(CXX) -print-file-name=libtsan.so)" OMP_NUM_THREADS=1 TSAN_OPTIONS=halt_on_error=1:history_size=4 \
	    EMULATION_FLAGS="-O1 -g1 -fsanitize=thread" $(BIN)/python -m pytest -q -s -k "not float64 and not round" \
	    tests/layers/test_ms_deform_attn_cuda_emulated.py

# Loading the result shows that it links with everything it needs; running it needs a GPU.
cuda-check: $(STAMP)
	DIMASKDINO_BUILD_OP=1 FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHS)" $(BIN)/python setup.py build_ext \
	    --build-temp build/cuda-check/objects --build-lib build/cuda-check/lib
	@$(BIN)/python -c 'import glob, torch; torch.ops.load_library(*glob.glob("build/cuda-check/lib/dimaskdino/_C*.so")); assert torch._C._dispatch_has_kernel_for_dispatch_key("dimaskdino::ms_deform_attn", "CUDA"); print("== compiled for $(CUDA_ARCHS) and loaded")'

# Without torch's cache of GPU memory, where a read past the end of a tensor hits another one. CUDA graphs need the cache.
GPU_TESTS := tests/layers/test_ms_deform_attn_gpu.py
SANITIZED_GPU_TESTS = PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(VENV)/lib/python*/site-packages/nvidia/cu13/bin/compute-sanitizer \
    --error-exitcode 1 $(1) $(BIN)/python -m pytest -q $(GPU_TESTS) -k "not graph"
gpu-check: $(STAMP)
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "error: make gpu-check needs a GPU that torch can use")'
	FORCE_CUDA=1 $(BIN)/python -m pip install --no-build-isolation -e .
	$(BIN)/python -m pip install nvidia-cuda-sanitizer-api==13.0.85
	$(BIN)/python -m pytest $(GPU_TESTS)
	$(call SANITIZED_GPU_TESTS,--tool memcheck)
	$(call SANITIZED_GPU_TESTS,--tool racecheck)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

# Trained models under output/ are left alone.
clean:
	rm -rf $(VENV) build dist *.egg-info dimaskdino/_C*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
