# Three images from one file:
#   docker build --target preprocess    -t diptych-preprocess .       slim, no torch
#   docker build --target executor-cpu  -t diptych-executor-cpu .
#   docker build --target executor-cuda -t diptych-executor-cuda .    torch brings CUDA; the host brings the driver

FROM python:3.12.8-slim-bookworm AS base
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

# The wheel, with the code generated from the protos.
FROM base AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-deps --wheel-dir /wheels .

# Environments are made in stages of their own, so that images hold neither sources nor build tools.
FROM base AS preprocess-environment
COPY --from=wheel /wheels /wheels
RUN python -m venv /opt/diptych \
    && /opt/diptych/bin/pip install "$(echo /wheels/diptych-*.whl)[preprocess]"

FROM base AS executor-cpu-environment
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY --from=wheel /wheels /wheels
RUN python -m venv /opt/diptych \
    && /opt/diptych/bin/pip install --index-url "${TORCH_INDEX}" "${TORCH}" \
    && /opt/diptych/bin/pip install "$(echo /wheels/diptych-*.whl)[executor]"

FROM base AS executor-cuda-environment
ARG TORCH=torch==2.13.0
COPY --from=wheel /wheels /wheels
RUN python -m venv /opt/diptych \
    && /opt/diptych/bin/pip install "${TORCH}" "$(echo /wheels/diptych-*.whl)[executor]"

# What every image runs in: nobody in particular, nothing fetched, caches where a read-only root allows them.
FROM base AS runtime
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin diptych
ENV PATH=/opt/diptych/bin:$PATH \
    HF_HUB_OFFLINE=1 \
    HF_HOME=/tmp/huggingface \
    DIPTYCH_MODEL=/model
USER 10001
ENTRYPOINT ["diptych"]

FROM runtime AS preprocess
COPY --from=preprocess-environment /opt/diptych /opt/diptych
EXPOSE 50051
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["diptych", "health", "--address", "127.0.0.1:50051", "--service", "diptych.v1.PreprocessService"]
CMD ["preprocess"]

FROM runtime AS executor-cpu
COPY --from=executor-cpu-environment /opt/diptych /opt/diptych
EXPOSE 50052
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s \
    CMD ["diptych", "health", "--address", "127.0.0.1:50052", "--service", "diptych.v1.ExecutorService"]
CMD ["executor", "--device", "cpu"]

FROM runtime AS executor-cuda
COPY --from=executor-cuda-environment /opt/diptych /opt/diptych
# Where kernels that a boot had to compile are kept; a volume there saves the next boots from doing it again.
USER 0
RUN install -d -o 10001 /cache
USER 10001
ENV XDG_CACHE_HOME=/cache
# Read by the container runtime that hands the GPU in.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
EXPOSE 50052
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s \
    CMD ["diptych", "health", "--address", "127.0.0.1:50052", "--service", "diptych.v1.ExecutorService"]
CMD ["executor", "--device", "cuda"]
