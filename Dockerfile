# The explorer:   docker build --target app -t thaw-app .
#                 docker run -p 8501:8501 -v ./runs:/runs thaw-app
# The trainer:    docker build --target trainer -t thaw .
#                 docker run --gpus all -v ./photos:/photos -v ./runs:/runs -v thaw-cache:/cache thaw \
#                     --phase finetune --data /photos --runs-dir /runs
# One command of it:  docker run ... --entrypoint python thaw -m export --help
#
# The image holds CUDA and cuDNN as wheels (about 9 GB); the host brings the driver and the NVIDIA
# Container Toolkit. For machines without a GPU: --build-arg DEVICE=cpu (about 2 GB).
ARG PYTHON_VERSION=3.12
FROM python:${PYTHON_VERSION}-slim AS base

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    THAW_CACHE=/cache \
    THAW_RUNS_DIR=/runs

WORKDIR /thaw
COPY requirements.txt requirements.txt

# For CPUs alone: PyTorch's own index has wheels without CUDA, and onnxruntime takes the GPU package's place.
ARG DEVICE=gpu
RUN if [ "$DEVICE" = cpu ]; then \
      sed -i 's/^onnxruntime-gpu\[cuda,cudnn\]/onnxruntime/' requirements.txt && \
      pip install --extra-index-url https://download.pytorch.org/whl/cpu \
        -r requirements.txt; \
    else \
      pip install -r requirements.txt; \
    fi

COPY . .

# What others upload is not read by root.
RUN useradd --create-home --uid 10001 thaw && \
    mkdir -p /runs /cache && \
    chown thaw /runs /cache
USER 10001
VOLUME ["/runs", "/cache"]


FROM base AS trainer
ENTRYPOINT ["python", "-m", "trainer"]
CMD ["--help"]


# Others reach it through the published port, so it makes itself read-only unless sign-in is set up (SECURITY.md).
FROM base AS app
EXPOSE 8501
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8501/_stcore/health', timeout=4)"]
ENTRYPOINT ["streamlit", "run", "streamlit_app.py", "--server.address", "0.0.0.0", "--server.headless", "true"]
