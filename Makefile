# Every target builds .venv when it is missing, and uses it as it is when it is not. PYTHON=python3.12 chooses another interpreter,
# CPU=1 torch's build without CUDA, which is a tenth of the size.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# SkyPilot has an environment of its own, because it needs other versions of our packages.
SKYPILOT := .venv-sky/.installed
# So has vLLM, which pins torch and holds Transformers and NumPy back.
VLLM := .venv-vllm/.installed
# Some tests make networks and mounts. Without root, they run as root of namespaces of their own, from which no other network is reached.
# Root of a namespace can mount no image and become no other user: tests that do are left out, and named at the end.
ifneq ($(shell id -u),0)
LEAVE_OUT := --no-machine-root
ifeq ($(shell unshare --map-root-user --mount --net true 2>/dev/null && echo may),may)
AS_ROOT := unshare --map-root-user --mount --net sh -c 'ip link set lo up && exec "$$0" "$$@"'
endif
endif
MINUTES ?= 20
SEEDS ?= 3
FUZZ_ROUNDS ?= 20
OUT ?= runs/gpu
AT ?= /opt/vllm
GPU = PYTHONPATH=framework $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m stillhouse.bench.gpu --out $(OUT)

COMPILE := $(BIN)/uv pip compile pyproject.toml --quiet --generate-hashes --no-header --no-annotate --python-version 3.11
LOCK := $(COMPILE) docker/build.in --python-platform x86_64-manylinux_2_28
# torch comes before the lock, with CUDA or without, and brings triton where it has CUDA.
LOCK_DEV := printf "torch; sys_platform == 'never'\ntriton; sys_platform == 'never'\n" | $(COMPILE) --extra dev --universal \
	--overrides - --no-emit-package torch --no-emit-package triton --no-emit-package setuptools
# vLLM's image libraries come as CUDA builds, beside which a CPU build of torch breaks Transformers; text needs none of them.
LOCK_VLLM := printf "$(foreach part,torch torchvision torchaudio torchcodec triton,$(part); sys_platform == 'never'\n)" \
	| $(COMPILE) --group test-vllm --python-platform x86_64-manylinux_2_28 --overrides -
PYTORCH_CPU := --extra-index-url https://download.pytorch.org/whl/cpu
TORCH_CPU ?= $(PYTORCH_CPU) --index-strategy unsafe-best-match
UPGRADE ?= --upgrade

# Install the Debian packages of commands that are not there, each given as command:package.
define where_missing
@for need in $(1); do \
	command -v $${need%:*} >/dev/null || missing="$$missing $${need#*:}"; \
done; \
if [ -n "$$missing" ]; then apt-get update -q && apt-get install -y -q --no-install-recommends $$missing; fi
endef

# Run a command, and print what it says when it has ended, so that the progress of a job beside it can be read.
told_at_its_end = @log=$$(mktemp); $(1) >$$log 2>&1; code=$$?; echo; cat $$log; rm $$log; exit $$code

.PHONY: help system system-slurm demo test test-whole test-parts test-vllm chaos slurm gpu gpu-dry check lint launch-files format lock \
	lock-dev lock-vllm package docs vllm bench clean

help:  ## what can be made
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/'

system:  ## Debian's packages that the tests need, where they are missing: namespaces, mounts, a file system and a sandbox
	$(call where_missing,ip:iproute2 unshare:util-linux setpriv:util-linux mount:mount mkfs.ext4:e2fsprogs bwrap:bubblewrap)

system-slurm:  ## Debian's packages that `make slurm` needs, where they are missing
	$(call where_missing,slurmctld:slurm-wlm slurmd:slurm-wlm munged:munge)

demo: $(INSTALLED)  ## distil a small model on this machine, and write runs/demo/report.html
	$(BIN)/stillhouse demo

test: $(INSTALLED)  ## the tests but those of `check`: real Ray, DeepSpeed, S3 protocol and models, small sizes; in parallel, for two cores
	@$(MAKE) --no-print-directory --jobs=2 test-whole test-parts test-vllm

# Two parts run at a time, which is what two cores can do: test-vllm begins, and is installed, when test-whole ends, the shorter of the others.
test-whole: $(INSTALLED)
	$(AS_ROOT) $(BIN)/pytest $(LEAVE_OUT) tests/chaos tests/e2e

test-parts: $(INSTALLED)
	$(call told_at_its_end,$(AS_ROOT) $(BIN)/pytest $(LEAVE_OUT) tests/attacks tests/fuzz tests/integration tests/unit tests/conformance)

test-vllm: $(INSTALLED) $(VLLM)  ## the tests that need vLLM, on the CPU, in an environment of its own
	$(call told_at_its_end,.venv-vllm/bin/pytest tests/vllm)

chaos: $(INSTALLED)  ## the long form: parsers fuzzed for FUZZ_ROUNDS (20), disasters in SEEDS (3) courses, random faults for MINUTES (20), and half as long for teachers alone
	$(BIN)/pytest tests/fuzz --fuzz-rounds=$(FUZZ_ROUNDS)
	$(AS_ROOT) $(BIN)/pytest $(LEAVE_OUT) tests/chaos --chaos-seeds=$(SEEDS)
	PYTHONPATH=tests $(AS_ROOT) $(BIN)/python -m chaos.soak --minutes $(MINUTES)

slurm: $(INSTALLED)  ## launch/slurm on a Slurm of two nodes, made here by root; needs `make system system-slurm`
	$(BIN)/pytest tests/slurm

# Nothing is installed: it uses .venv if there is one, else PYTHON with its packages and those of WHEELS.
gpu:  ## all that needs a GPU, in nine minutes at most: kernels, their tests, speed, a run; OUT=runs/gpu, ONLY=part,part, WHEELS=directory
	$(GPU) $(if $(ONLY),--only $(ONLY)) $(if $(WHEELS),--wheels $(WHEELS))

gpu-dry:  ## the same at tiny sizes on the CPU: whether it runs, not how fast
	$(GPU) --dry-run $(if $(ONLY),--only $(ONLY))

check: lint launch-files  ## lint, launch-files

lint: $(INSTALLED)  ## format, lint, types and import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

launch-files: $(INSTALLED) $(SKYPILOT)  ## launch, image, workflow and config files by their readers' schemas; the package; the pages and their links
	$(BIN)/pytest tests/launch tests/unit/test_configs.py

format: $(INSTALLED)  ## format, and fix what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: lock-dev lock-vllm  ## all locks, by hash, anew from pyproject.toml: what the images install, and this checkout
	$(LOCK) $(UPGRADE) --output-file docker/gpu.lock
	$(LOCK) $(UPGRADE) --extra vllm --output-file docker/vllm.lock
	$(LOCK) $(UPGRADE) --override docker/cpu.in $(TORCH_CPU) --output-file docker/cpu.lock

lock-dev: $(INSTALLED)  ## the lock of this checkout alone; UPGRADE= keeps the versions that still fit
	$(LOCK_DEV) $(UPGRADE) --output-file requirements-dev.lock

lock-vllm: $(INSTALLED)  ## the lock of .venv-vllm alone; UPGRADE= keeps the versions that still fit
	$(LOCK_VLLM) $(UPGRADE) --output-file requirements-vllm.lock

package: $(INSTALLED)  ## the sdist and the wheel, in dist/
	rm -rf dist
	$(BIN)/python -m hatchling build

docs: $(INSTALLED)  ## the pages of docs/ as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

vllm:  ## an environment for teachers on vLLM, on a machine with GPUs, at AT (/opt/vllm): teacher.python = "/opt/vllm/bin/python"
	test -x $(AT)/bin/python || $(PYTHON) -m venv $(AT)
	$(AT)/bin/pip install --quiet --disable-pip-version-check --require-hashes --no-deps --requirement docker/vllm.lock
	$(AT)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .

bench: $(INSTALLED)  ## the pipeline against one process doing the same work
	$(BIN)/stillhouse bench pipeline

clean:  ## remove the environment and caches; runs/ stays
	rm -rf .venv .venv-sky .venv-vllm .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis

# torch comes first and alone, so that a CPU build that is at hand satisfies everything after it. Then the lock, by its hashes;
# the last line adds what the lock leaves to the machine (triton), and checks the rest against pyproject.toml.
$(INSTALLED): pyproject.toml requirements-dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "Stillhouse needs Python 3.11 or newer; $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 1)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(if $(CPU),$(PYTORCH_CPU)) 'torch>=2.9,<2.14'
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps --requirement requirements-dev.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[dev]'
	@touch $@

$(SKYPILOT):
	test -x .venv-sky/bin/python || $(PYTHON) -m venv .venv-sky
	.venv-sky/bin/pip install --quiet --disable-pip-version-check 'skypilot==0.14.1'
	@touch $@

# torch comes first, as above, in the one version that vLLM 0.32 pins. The rest comes by uv, in a fifth of pip's time; a package index of
# your own it finds in UV_DEFAULT_INDEX. `pip check` misses torchvision, torchaudio, torchcodec and triton, which are left out.
$(VLLM): pyproject.toml requirements-vllm.lock | $(INSTALLED)
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check $(if $(CPU),$(PYTORCH_CPU)) 'torch==2.13.0'
	$(BIN)/uv pip install --quiet --compile-bytecode --python .venv-vllm/bin/python --require-hashes --no-deps --requirement requirements-vllm.lock
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
