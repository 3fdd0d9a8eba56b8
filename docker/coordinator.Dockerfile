# The coordinator, and the command line: no torch. Build from the repository's root:
#   docker build --file docker/coordinator.Dockerfile --tag percheron/coordinator:0.1.0 .
FROM rust:1.95-slim-bookworm AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends cmake g++ make nasm \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# Only what the command needs, so torch's bindings are not built.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    cargo build --release --locked --package cli \
    && strip target/release/percheron

FROM debian:bookworm-slim
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /src/target/release/percheron /usr/local/bin/percheron
COPY LICENSE-APACHE LICENSE-MIT /usr/share/doc/percheron/
USER 65532:65532
# No entry point: some batch services only replace the command.
CMD ["percheron", "coordinator", "--help"]
