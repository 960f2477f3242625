# minidcp for a machine with 8 H100 or H200. CUDA 13 comes with torch's wheels: the host needs NVIDIA's driver,
# 580 or newer, and its container toolkit, nothing else.
#
#   docker build -t minidcp .
#   docker run --gpus all --ipc=host --stop-timeout 60 -p 8000:8000 \
#       -v minidcp-hub:/home/minidcp/.cache/huggingface minidcp deepseek-ai/DeepSeek-V2 --tp-size 8 --dcp-size 8
#
# Flags follow the image's name. --ipc=host (or --shm-size=16g): NCCL's ranks meet in /dev/shm, of which Docker
# gives 64 MB. --stop-timeout: running requests get 30 s to finish, of which Docker leaves 10. More of this is in
# examples/README.md and docs/operations.md.

ARG PYTHON_VERSION=3.12

# FlashAttention-3, compiled for DeepSeek's head dims, is one shared object of vLLM's wheel. It is built against one
# release of torch: change both versions together. minidcp/kernels/fa3.py finds it without the rest of vLLM.
FROM python:${PYTHON_VERSION}-slim-bookworm AS fa3
ARG VLLM_VERSION=0.24.0
WORKDIR /fa3
RUN pip download --no-cache-dir --no-deps --only-binary=:all: --dest wheel "vllm==${VLLM_VERSION}" \
    && python -m zipfile -e wheel/vllm-*.whl wheel \
    && mkdir -p site/vllm/vllm_flash_attn \
    && mv wheel/vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so site/vllm/vllm_flash_attn/ \
    && mv wheel/vllm-*.dist-info/licenses/LICENSE site/vllm/ \
    && rm -r wheel

FROM python:${PYTHON_VERSION}-slim-bookworm

# Triton compiles its launchers when it first meets a GPU: gcc here, Python's headers are in the base image. tini is
# PID 1, so that SIGTERM ends a server that is still loading, and no dead rank stays as a zombie.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev tini \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# From the layer that changes least to the one that changes most: torch with CUDA (several GB), FA3, the other
# packages, and the engine itself.
ARG TORCH_VERSION=2.11.0
RUN pip install "torch==${TORCH_VERSION}"

COPY --from=fa3 /fa3/site /opt/fa3
ENV PYTHONPATH=/opt/fa3

WORKDIR /src
COPY pyproject.toml ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        print(*p['dependencies'], *p['optional-dependencies']['server'], sep='\n')" > requirements.txt \
    && pip install -r requirements.txt "torch==${TORCH_VERSION}"

COPY README.md LICENSE ./
COPY minidcp minidcp
COPY server server
RUN pip install --no-deps . && rm -rf /src/*

# Fails if FA3 was built against another torch: the engine would choose a slower back-end, without an error. It is
# linked to the driver's libcuda, which builders lack. A stub with the one function that it takes from there will do.
# An image without CUDA, for tests of all the rest, is had by asking for it: TORCH_VERSION=2.13.0+cpu, for example.
RUN case "${TORCH_VERSION}" in *+cpu) echo "FA3 is not loaded: torch ${TORCH_VERSION} has no CUDA"; exit 0;; esac \
    && mkdir /stub \
    && echo 'int cuTensorMapEncodeTiled(void) { return 1; }' | gcc -shared -x c -o /stub/libcuda.so.1 - \
    && LD_LIBRARY_PATH=/stub python -c "from minidcp.kernels.fa3 import load_operators; \
        ops = load_operators().ops; print(ops.fwd, ops.get_scheduler_metadata)" \
    && rm -r /stub

# Containers may run under any user id, as OpenShift's do: these are in group 0, so that group may write. A volume that
# is new takes its owner and mode from the folder it is mounted on, so the hub's cache exists beforehand.
RUN useradd --uid 1000 --user-group --create-home minidcp \
    && install -d -o minidcp -g 0 -m 2775 /home/minidcp /home/minidcp/.cache /home/minidcp/.cache/huggingface \
        /home/minidcp/.triton
USER 1000:1000
WORKDIR /home/minidcp
# LOGNAME: a user id without an entry in /etc/passwd has no name, and torch asks for it.
# FlashInfer, in images built on this one, compiles to where Triton does.
ENV HOME=/home/minidcp LOGNAME=minidcp PYTHONUNBUFFERED=1 NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    FLASHINFER_WORKSPACE_BASE=/home/minidcp/.triton

LABEL org.opencontainers.image.title="minidcp" \
      org.opencontainers.image.description="Decodes DeepSeek-V2 with tensor and decode context parallelism" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"

EXPOSE 8000
# The server writes its address to this file, whatever --host and --port are.
ENV MINIDCP_ADDRESS_FILE=/tmp/minidcp-address
# /health answers 503 until the engine is warm; loading 472 GB from a slow disk takes its time. No proxy stands between,
# even where HTTP_PROXY is set.
HEALTHCHECK --start-period=60m --interval=15s --timeout=5s --retries=4 \
    CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open(open(os.environ['MINIDCP_ADDRESS_FILE']).read() + '/health', timeout=4)"]

ENTRYPOINT ["tini", "--", "minidcp", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--help"]
