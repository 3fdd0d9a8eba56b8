# The worker: the command line, the training process, and libtorch. Build from the repository's root:
#   docker build --file docker/worker.Dockerfile --tag percheron/worker:0.1.0 .
# libtorch comes from the published wheels, with CUDA; the driver comes from the host.
FROM rust:1.95-slim-bookworm AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends cmake g++ make nasm python3 python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
ENV PERCHERON_CACHE=/cache
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    cargo xtask setup \
    && cargo build --release --locked --package cli --package worker \
    && strip target/release/percheron target/release/percheron-worker
RUN mkdir /out && cp --archive --dereference .libtorch/lib /out/lib

FROM debian:bookworm-slim
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates libgomp1 libstdc++6 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /out/lib /opt/libtorch/lib
COPY --from=build /src/target/release/percheron /src/target/release/percheron-worker /usr/local/bin/
COPY LICENSE-APACHE LICENSE-MIT /usr/share/doc/percheron/
ENV LD_LIBRARY_PATH=/opt/libtorch/lib \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65532:65532
# No entry point: some batch services only replace the command.
CMD ["percheron", "guard", "--help"]
