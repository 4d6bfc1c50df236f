# docker build -t rtsseg .
# docker run --rm --shm-size=8g -v "$PWD/runs:/rtsseg/runs" rtsseg
#   --gpus all for a GPU; `make test` at the end for the tests.
#   --shm-size: loader workers hand batches over in shared memory. A container has 64 MB of it,
#   and a loader of the baseline holds 2.1 GB.
FROM python:3.11-slim
RUN apt-get update \
 && apt-get install -y --no-install-recommends git make libexpat1 \
 && rm -rf /var/lib/apt/lists/*
ENV PYTHONHASHSEED=42
WORKDIR /rtsseg
COPY . .
RUN make install
CMD ["make", "demo"]
