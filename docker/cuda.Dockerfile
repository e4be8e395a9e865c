# distclip on NVIDIA GPUs.
#   docker build -f docker/cuda.Dockerfile -t distclip:cuda .
#   docker run --rm --gpus all --ipc=host distclip:cuda torchrun --nproc-per-node 8 two_nodes.py
# torch's own wheel brings CUDA, cuDNN, NCCL and Triton: no CUDA base image is needed, only the
# driver and the NVIDIA container toolkit on the host. The versions are those of
# launch/constraints.txt; tests/test_docker.py holds them together.
ARG PYTHON=3.12.12
FROM python:${PYTHON}-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/venv
WORKDIR /src
COPY launch/constraints.txt launch/constraints.txt
RUN /opt/venv/bin/pip install --constraint launch/constraints.txt torch==2.13.0
COPY pyproject.toml README.md LICENSE ./
COPY distclip distclip
RUN /opt/venv/bin/pip install --constraint launch/constraints.txt ".[accelerate,plot]" && \
    /opt/venv/bin/pip check

FROM python:${PYTHON}-slim-bookworm
# What the NVIDIA container toolkit is to give the container: the driver's compute part.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --create-home --uid 1000 distclip
COPY --from=build /opt/venv /opt/venv
WORKDIR /home/distclip/work
COPY --chown=distclip:distclip configs configs
COPY --chown=distclip:distclip docker/two_nodes.py two_nodes.py
USER 1000
HEALTHCHECK --interval=30s --timeout=30s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import distclip, torch; assert torch.cuda.is_available()"]
CMD ["distclip", "--help"]
