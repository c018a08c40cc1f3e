# jaxcl for CPU or, with --build-arg ACCELERATOR=cuda13, for NVIDIA GPUs:
#     docker build -t jaxcl .
#     docker build -t jaxcl:cuda --build-arg ACCELERATOR=cuda13 .
#     docker run --rm -v "$PWD/runs:/runs" jaxcl train --config=digits --workdir=/runs/digits --devices=8
#     docker run --rm --gpus=all --shm-size=8g -v "$PWD/runs:/runs" jaxcl:cuda train --config=split_cifar10 --workdir=/runs/cifar
# JAX's wheels bring CUDA; the host needs the driver alone, and the container runtime of NVIDIA.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm AS build
ARG ACCELERATOR=cpu
WORKDIR /src
COPY requirements.txt ./
RUN python -m venv /opt/jaxcl && /opt/jaxcl/bin/pip install --no-cache-dir -r requirements.txt
# The plug-in of the same version as the jax that is pinned.
RUN if [ "$ACCELERATOR" != cpu ]; then \
        version=$(/opt/jaxcl/bin/python -c 'import jax; print(jax.__version__)') && \
        /opt/jaxcl/bin/pip install --no-cache-dir "jax[$ACCELERATOR]==$version"; \
    fi
COPY . .
RUN /opt/jaxcl/bin/pip install --no-cache-dir --no-deps .

FROM python:${PYTHON}-slim-bookworm
COPY --from=build /opt/jaxcl /opt/jaxcl
# Signals reach the command, which is process 1: no shell stands before it.
RUN useradd --create-home --uid 1000 jaxcl && mkdir /runs && chown jaxcl /runs
USER 1000
ENV PATH=/opt/jaxcl/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /home/jaxcl
VOLUME /runs
ENTRYPOINT ["jaxcl"]
CMD ["--help"]
