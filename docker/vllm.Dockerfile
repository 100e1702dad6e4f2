# syntax=docker/dockerfile:1
# Stillhouse on NVIDIA GPUs, as gpu.Dockerfile, and a second environment for teachers on vLLM: `docker build -f docker/vllm.Dockerfile -t stillhouse:vllm .`
# Teachers run in /opt/vllm where teacher.python = "/opt/vllm/bin/python", everything else in /opt/stillhouse.
#
# The base is pinned. To take a newer one: `docker buildx imagetools inspect python:3.11-slim-bookworm`, its digest here and in the others.
# What is installed is docker/gpu.lock and docker/vllm.lock, by their hashes; `make lock` makes them anew from pyproject.toml.
ARG BASE=python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/stillhouse && python -m venv /opt/vllm
COPY docker/gpu.lock docker/vllm.lock /tmp/
RUN /opt/stillhouse/bin/pip install --require-hashes --no-deps -r /tmp/gpu.lock \
    && /opt/vllm/bin/pip install --require-hashes --no-deps -r /tmp/vllm.lock
COPY pyproject.toml README.md LICENSE /src/
COPY framework /src/framework
RUN /opt/stillhouse/bin/pip install --no-deps --no-build-isolation /src \
    && /opt/vllm/bin/pip install --no-deps --no-build-isolation /src

FROM ${BASE}
# gcc: Triton compiles what launches its kernels.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin stillhouse \
    && install -d -o 10001 -g 10001 /runs
COPY --from=build /opt/stillhouse /opt/stillhouse
COPY --from=build /opt/vllm /opt/vllm
ENV PATH=/opt/stillhouse/bin:$PATH \
    HOME=/home/stillhouse \
    PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=token \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /runs
# Healthy: this machine is in no cluster, or the head of its cluster answers.
HEALTHCHECK --interval=30s --timeout=15s --start-period=60s CMD ["stillhouse", "node", "health"]
ENTRYPOINT ["stillhouse"]
CMD ["--help"]
