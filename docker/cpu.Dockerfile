# syntax=docker/dockerfile:1
# Stillhouse on CPUs: the demo, the tests and compose.yaml. `docker build -f docker/cpu.Dockerfile -t stillhouse:cpu .`
#
# The base is pinned. To take a newer one: `docker buildx imagetools inspect python:3.11-slim-bookworm`, its digest here and in the others.
# What is installed is docker/cpu.lock, by its hashes; `make lock` makes it anew from pyproject.toml.
ARG BASE=python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/stillhouse
COPY docker/cpu.lock /tmp/cpu.lock
RUN /opt/stillhouse/bin/pip install --require-hashes --no-deps --extra-index-url https://download.pytorch.org/whl/cpu -r /tmp/cpu.lock
COPY pyproject.toml README.md LICENSE /src/
COPY framework /src/framework
RUN /opt/stillhouse/bin/pip install --no-deps --no-build-isolation /src

FROM ${BASE}
# gcc: the block-max filter is compiled for the processor that it runs on.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin stillhouse \
    && install -d -o 10001 -g 10001 /runs
COPY --from=build /opt/stillhouse /opt/stillhouse
ENV PATH=/opt/stillhouse/bin:$PATH \
    HOME=/home/stillhouse \
    PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=token
USER 10001:10001
WORKDIR /runs
# Healthy: this machine is in no cluster, or the head of its cluster answers.
HEALTHCHECK --interval=30s --timeout=15s --start-period=60s CMD ["stillhouse", "node", "health"]
ENTRYPOINT ["stillhouse"]
CMD ["--help"]
