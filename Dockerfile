# docker build --build-arg UID=$(id -u) -t rtsseg .
# docker run --rm --shm-size=8g -v "$PWD/runs:/rtsseg/runs" rtsseg
#   --gpus all for a GPU; `make test` at the end for the tests.
#   --shm-size: loader workers hand batches over in shared memory. A container has 64 MB of it,
#   and a loader of the baseline holds 2.1 GB.
#   UID: the user that owns the runs folder; no process in the container is root.
#   The digest is that of the image index, for amd64 and arm64; `docker buildx imagetools inspect
#   python:3.11-slim-bookworm` prints the present one.
FROM python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b
RUN apt-get update \
 && apt-get install -y --no-install-recommends git make libexpat1 \
 && rm -rf /var/lib/apt/lists/*
ARG UID=1000
RUN useradd --uid ${UID} --create-home rtsseg && install -d -o rtsseg /rtsseg /rtsseg/runs
USER rtsseg
ENV PYTHONHASHSEED=42
WORKDIR /rtsseg
# The environment is a layer of its own, which changes with the lock alone
COPY --chown=rtsseg requirements.txt ./
RUN python3.11 -m venv .venv && .venv/bin/pip install --no-cache-dir --require-hashes -r requirements.txt
COPY --chown=rtsseg . .
RUN make install
CMD ["make", "demo"]
