# distclip on CPU: for CI, and for runs of several gloo ranks without a GPU.
#   docker build -f docker/cpu.Dockerfile -t distclip:cpu .
# The versions are those of launch/constraints.txt; tests/test_docker.py holds them together.
ARG PYTHON=3.12.12
FROM python:${PYTHON}-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/venv
WORKDIR /src
COPY launch/constraints.txt launch/constraints.txt
# torch alone first: it is large, and changes less often than what lies below. By its full name:
# where this index cannot be reached, torch==2.13.0 would bring gigabytes of CUDA from the other.
RUN /opt/venv/bin/pip install --extra-index-url https://download.pytorch.org/whl/cpu \
    --constraint launch/constraints.txt torch==2.13.0+cpu
COPY pyproject.toml README.md LICENSE ./
COPY distclip distclip
RUN /opt/venv/bin/pip install --extra-index-url https://download.pytorch.org/whl/cpu \
    --constraint launch/constraints.txt ".[test]" && \
    /opt/venv/bin/pip check

FROM python:${PYTHON}-slim-bookworm
# One thread per rank: ranks in one container would otherwise fight for its cores.
ENV PATH=/opt/venv/bin:$PATH OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 distclip
COPY --from=build /opt/venv /opt/venv
WORKDIR /home/distclip/work
COPY --chown=distclip:distclip configs configs
COPY --chown=distclip:distclip docker/two_nodes.py two_nodes.py
USER 1000
HEALTHCHECK --interval=30s --timeout=20s --start-period=10s --retries=3 \
    CMD ["python", "-c", "import distclip, torch.distributed as d; assert d.is_gloo_available()"]
CMD ["distclip", "--help"]
