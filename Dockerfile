# The repository, installed:                docker build -t dimaskdino .
# with kernels for GPUs elsewhere as well:  docker build --build-arg FORCE_CUDA=1 -t dimaskdino:cuda .
# `make docker-check` runs the RUN lines without Docker. docs/install.md has more.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
# 1 builds the CUDA kernels of the op for TORCH_CUDA_ARCH_LIST.
ARG FORCE_CUDA=0
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX"
# pip's settings, such as an index with torch for the CPU alone, which is gigabytes smaller.
ARG PIP_EXTRA_INDEX_URL=""
ARG PIP_NO_CACHE_DIR=1
RUN apt-get update && apt-get install -y --no-install-recommends g++ git make && rm -rf /var/lib/apt/lists/*
WORKDIR /dimaskdino
COPY . .
RUN make install
ENV PATH="/dimaskdino/.venv/bin:${PATH}"
CMD ["bash"]
