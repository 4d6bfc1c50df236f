# docker build -t rtsseg .
# docker run --rm -v "$PWD/runs:/rtsseg/runs" rtsseg          (--gpus all for a GPU; `make test` at the end for the tests)
FROM python:3.11-slim
RUN apt-get update \
 && apt-get install -y --no-install-recommends git make libexpat1 \
 && rm -rf /var/lib/apt/lists/*
ENV PYTHONHASHSEED=42
WORKDIR /rtsseg
COPY . .
RUN make install
CMD ["make", "demo"]
